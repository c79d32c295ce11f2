"""The command `flashclient`, also as `python -m flashclient`."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:  # -m puts the current folder first in sys.path
    del sys.path[0]

from flashclient.interrupts import end_quietly


def main() -> int:
    """Runs the command; returns its exit status."""
    end_quietly()  # before the imports, which take a while
    from flashclient.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
