"""Answers to slips on a command line: a command of the other program or of another tool, a misspelt name or flag."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Sequence

# What people type who know other tools, and the command that does it here.
MEANT = {
    "calibrate": "flashclient calibrate",
    "chat": "flashclient chat",
    "check": "weightd doctor",
    "complete": "flashclient generate",
    "convert": "weightd import",
    "delete": "weightd rm",
    "doctor": "weightd doctor",
    "download": "weightd import",
    "eval": "flashclient eval",
    "evaluate": "flashclient eval",
    "generate": "flashclient generate",
    "import": "weightd import",
    "list": "weightd ls",
    "ls": "weightd ls",
    "plan": "weightd plan",
    "probe": "weightd probe",
    "ps": "weightd top",
    "pull": "weightd import",
    "remove": "weightd rm",
    "rm": "weightd rm",
    "run": "flashclient run",
    "server": "flashclient serve",
    "show": "weightd ls",
    "start": "weightd --store DIR",
    "stats": "weightd top",
    "status": "weightd top",
    "top": "weightd top",
    "verify": "weightd verify",
}
UNRECOGNIZED = "unrecognized arguments: "  # how argparse begins its message


def no_command(program: str, given: str, known: Sequence[str]) -> str:
    """The error for a word that is no command of `program`, which has those that are `known`."""
    near = difflib.get_close_matches(given, known, n=1)
    meant = f"{program} {near[0]}" if near else MEANT.get(given)
    if meant is None and ("/" in given or given.endswith(".gguf")):
        meant = f"flashclient run {given}"
    says = f"there is no command '{given}'"
    return f"{says}; did you mean '{meant}'?" if meant else f"{says}: use {', '.join(known[:-1])} or {known[-1]}"


def told(parser: argparse.ArgumentParser, message: str) -> str:
    """An error of `parser` as it is shown: unknown flags are named with what was meant."""
    says = _told(parser, message)
    return says if says.endswith("?") else f"{says}; see {parser.prog} --help"


def _told(parser: argparse.ArgumentParser, message: str) -> str:
    if not message.startswith(UNRECOGNIZED):
        return message
    words = message.removeprefix(UNRECOGNIZED).split()
    flag = next((word for word in words if word.startswith("-") and word != "-"), None)
    if flag is None:
        return message
    name = flag.partition("=")[0]
    near = difflib.get_close_matches(name, sorted(set(_flags(parser))), n=1, cutoff=0.7)
    return f"unknown flag '{name}'" + (f"; did you mean '{near[0]}'?" if near else "")


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _flags(command)
        elif action.help != argparse.SUPPRESS:
            yield from action.option_strings
