"""client/QUESTIONS.md: the programs understand its commands, and the messages that it explains are theirs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

import pytest
from repository import ROOT

from flashclient import cli as flashclient_cli
from weightd import cli as weightd_cli
from weightd.gateway import certificates
from weightd.planning import plan, probe
from weightd.serving.config import load_config
from weightd.watching import top

TEXT = (ROOT / "client" / "QUESTIONS.md").read_text()
COMMANDS = re.findall(r"^    ((?:weightd|flashclient) .*)$", TEXT, re.MULTILINE)
MESSAGES = re.findall(r"^\| `([^`]+)` \|", TEXT, re.MULTILINE)
SOURCES = [
    path.read_text()
    for folder in ("weightd/weightd", "weightd/native", "client/flashclient")
    for pattern in ("*.py", "*.cpp")
    for path in (ROOT / folder).rglob(pattern)
]
# Commands of weightd with a parser of their own.
PARSERS: dict[str, Callable[[list[str]], object]] = {
    "plan": lambda words: plan._parser().parse_args(words),
    "probe": lambda words: probe._parser().parse_args(words),
    "top": lambda words: top._parser().parse_args(words),
    "cert": lambda words: certificates._parser().parse_args(words),
    "serve": load_config,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "flashclient":
        flashclient_cli._parsed(words)
    elif words[0] in PARSERS:
        PARSERS[words[0]](words[1:])
    else:
        weightd_cli._parser().parse_args(words)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_ours(message: str) -> None:
    assert any(message in source for source in SOURCES)


def test_there_are_commands_and_messages() -> None:
    assert len(COMMANDS) > 10
    assert len(MESSAGES) > 10
