"""`python -m flashclient`, the same as the command."""

import sys

from flashclient.cli import main

sys.exit(main())
