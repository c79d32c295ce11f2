"""Command lines: a wrong one is one UsageError."""

from __future__ import annotations

import argparse
from typing import NoReturn

from weightd.errors import UsageError


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError, one line, instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")
