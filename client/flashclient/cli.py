"""The command `flashclient`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from flashclient import standard_streams
from flashclient.commands import calibrate, chat, evaluate, generate, run, serve
from flashclient.commands.arguments import utf8
from flashclient.commands.completion import add_completion
from flashclient.commands.keywords import in_flags
from flashclient.commands.slips import UNRECOGNIZED, no_command, told
from flashclient.errors import FlashClientError, OptionError
from flashclient.interrupts import STATUS, raise_again
from flashclient.standard_streams import complain

# They take seconds to import: a usage error or --help should not wait for them.
PACKAGES = ("torch", "transformers")
COMMANDS = (run, chat, generate, serve, calibrate, evaluate)
OWN = f"{Path(__file__).parent}{os.sep}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(told(self, message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flashclient", description="Run large language models from flash, through a weightd.")
    parser.add_argument("--version", action="version", version=f"flashclient {version('weightd')}")
    add_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


def _check_command(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Raises OptionError if the first word is no command."""
    known = next(action.choices for action in parser._actions if action.dest == "command")
    assert known is not None
    if not arguments:
        raise OptionError(f"a command is needed: {', '.join(known)}; see flashclient --help")
    if arguments[0].startswith("-") and any(one in known for one in arguments[1:]):
        flag, command = arguments[0].partition("=")[0], next(one for one in arguments[1:] if one in known)
        if flag not in parser._option_string_actions:
            raise OptionError(f"the command comes first: flashclient {command} ... {flag} ...")
    if not arguments[0].startswith("-") and arguments[0] not in known:
        raise OptionError(no_command("flashclient", arguments[0], list(known)))


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    """argparse takes an optional argument only directly behind the others, and a prompt may follow flags, too."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["help"]:
        given = [*given[1:], "--help"]
    _check_command(parser, given)
    options, rest = parser.parse_known_args(given)
    takes_one = getattr(options, "prompt", "") is None
    match rest:
        case []:
            pass
        case ["--", text] | [text] if takes_one and (len(rest) == 2 or text == "-" or not text.startswith("-")):
            try:
                options.prompt = utf8(text)
            except argparse.ArgumentTypeError as error:
                parser.error(str(error))
        case _:
            parser.error(f"{UNRECOGNIZED}{' '.join(rest)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 (failed) or 2 (usage)."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before the import: gRPC's core would write its own log lines
    return standard_streams.run("flashclient", lambda: _main(arguments))


def _main(arguments: list[str] | None) -> int:
    try:
        options = _parsed(arguments)
        _check_packages()
        raise_again()
        with _own_warnings_in_one_line():
            status: int = options.run(options)
    except FlashClientError as error:
        complain("flashclient", in_flags(str(error)))
        return error.exit_status
    except KeyboardInterrupt:
        return STATUS
    return status


@contextmanager
def _own_warnings_in_one_line() -> Iterator[None]:
    """Warnings of the library are told as its errors are: without the place in the code, and with flags."""

    def show(message: Warning | str, category: type[Warning], filename: str, *more: Any) -> None:
        if filename.startswith(OWN):
            complain("flashclient", in_flags(str(message)))
        else:
            others(message, category, filename, *more)

    module: Any = warnings
    with warnings.catch_warnings():
        others, module.showwarning = module.showwarning, show
        yield


def _check_packages() -> None:
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise FlashClientError(f"this needs {' and '.join(missing)}: pip install 'weightd[client]'")
