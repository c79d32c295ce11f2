"""The parser of command lines, which raises UsageError for a wrong one."""

from __future__ import annotations

import argparse
from typing import NoReturn

from flashclient.commands.slips import told
from weightd.errors import UsageError


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError with one line instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(told(self, message))
