"""`python -m weightd`: the command weightd."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:  # Python has put the current folder first, whatever lies there
    del sys.path[0]

from weightd.cli import main

if __name__ == "__main__":
    sys.exit(main())
