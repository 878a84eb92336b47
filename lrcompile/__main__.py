"""`python -m lrcompile`."""

import sys

from lrcompile.cli import main

if __name__ == "__main__":
    sys.exit(main())
