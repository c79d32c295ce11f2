"""`python -m flashclient`, the same as the command."""

import sys

if not sys.flags.safe_path:  # Python has put the current folder first: what lies there by chance is none of our modules
    del sys.path[0]

from flashclient.cli import main

sys.exit(main())
