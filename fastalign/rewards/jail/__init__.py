"""What runs inside a sandbox's processes: scripts and modules that import the standard library and each other alone.

`enter.py` is started by `rewards.confinement`, never imported by it; the interpreter that runs it starts with no site and no
environment. Its neighbours are found next to it.
"""
