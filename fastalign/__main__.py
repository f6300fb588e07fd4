"""`python -m fastalign` is the command `fastalign`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
