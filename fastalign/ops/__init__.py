"""Every op: validate, autograd, choose a backend. One file an op; `reference.py` is the specification."""
