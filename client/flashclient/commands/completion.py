"""`--print-completion SHELL`: what a shell needs to complete a command line, written by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

SHELLS = ("bash", "zsh", "fish", "tcsh")
FLAG = "--print-completion"
PATHS = ("source", "model", "models")  # arguments that may be a path


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script of a shell for a parser and its commands. Paths are completed as files or folders."""
    import shtab  # only those who ask for it wait for it

    for action in _actions(parser):
        if action.metavar in ("DIR", "FILE") or action.dest in PATHS:
            action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)


class PrintCompletion(argparse.Action):
    """Prints the script, and ends."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        print(completion(parser, str(values)))
        parser.exit()


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Adds the flag."""
    purpose = "print what a shell needs to complete command lines"
    parser.add_argument(FLAG, action=PrintCompletion, choices=SHELLS, metavar="SHELL", help=purpose)
