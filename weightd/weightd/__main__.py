"""`python -m weightd`: the command weightd."""

import sys

from weightd.cli import main

if __name__ == "__main__":
    sys.exit(main())
