"""`python -m weightd`: the command weightd."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:  # -m puts the current folder first in sys.path
    del sys.path[0]

from weightd.cli import main

if __name__ == "__main__":
    sys.exit(main())
