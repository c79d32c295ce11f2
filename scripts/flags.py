"""The parser of the scripts' command lines. A wrong one gives one line on standard error and exit status 2."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from weightd.errors import UsageError
from weightd.sizes import parse_size


class FlagParser(argparse.ArgumentParser):
    """Describes the script by its module's docstring. Flags cannot be abbreviated."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            prog=Path(sys.argv[0]).stem,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def size_given(text: str) -> int:
    """The bytes of a flag's size, such as 10GB. Raises argparse.ArgumentTypeError."""
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
