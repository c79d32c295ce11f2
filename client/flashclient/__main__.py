"""`python -m flashclient`, the same as the command."""

import sys

if not sys.flags.safe_path:  # Python puts the current folder first, and files in it must not replace modules
    del sys.path[0]

from flashclient.cli import main

sys.exit(main())
