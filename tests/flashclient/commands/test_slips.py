"""Slips on a command line: what was meant is named, by the program where it is."""

from __future__ import annotations

import argparse
from contextlib import suppress

import pytest

from flashclient import cli as flashclient_cli
from flashclient.commands.slips import MEANT, no_command
from weightd import cli as weightd_cli

MAINS = {"flashclient": flashclient_cli.main, "weightd": weightd_cli.main}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("weightd list", "did you mean 'weightd ls'?"),
        ("weightd pull a/b", "did you mean 'weightd import'?"),
        ("weightd chat m", "did you mean 'flashclient chat'?"),
        ("weightd verfy", "did you mean 'weightd verify'?"),
        ("weightd import --store /s m --dtpe int8", "unknown flag '--dtpe'; did you mean '--dtype'?"),
        ("weightd plan m --dran 3", "unknown flag '--dran'; did you mean '--dram'?"),
        ("weightd serve --stoer /s", "unknown flag '--stoer'; did you mean '--store'?"),
        ("weightd frobnicate", "there is no command 'frobnicate': use import, ls, rm"),
        ("flashclient ls", "did you mean 'weightd ls'?"),
        ("flashclient genrate m hi", "did you mean 'flashclient generate'?"),
        ("flashclient ./model.gguf", "did you mean 'flashclient run ./model.gguf'?"),
        ("flashclient generate m hi --temprature=1", "unknown flag '--temprature'; did you mean '--temperature'?"),
        ("flashclient generate m hi there --ctx-size 9", "unknown flag '--ctx-size'; see flashclient --help"),
        ("flashclient generate m hi there", "unrecognized arguments: "),
        ("flashclient", "a command is needed: run, chat"),
    ],
)
def test_what_was_meant_is_named(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = line.split()
    assert MAINS[program](arguments) == 2
    output = capsys.readouterr()
    assert says in output.err
    assert output.err.count("\n") == 1
    assert not output.out


@pytest.mark.parametrize("program", MAINS)
def test_a_version_and_help_in_words(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):
        assert MAINS[program](["--version"]) == 0
    assert capsys.readouterr().out.split()[0] == program
    with pytest.raises(SystemExit, match="0"):
        MAINS[program](["help"])
    assert f"usage: {program}" in capsys.readouterr().out


def test_serve_is_what_weightd_does_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["serve"], []):
        assert weightd_cli.main(arguments) == 2
        assert "--store DIR is needed" in capsys.readouterr().err


def test_every_command_that_is_named_is_there() -> None:
    for meant in MEANT.values():
        program, command, *_ = meant.split()
        if not command.startswith("-"):
            assert no_command(program, f"{command}x", [command]).endswith(f"did you mean '{program} {command}'?")
            with pytest.raises(SystemExit, match="0"):
                MAINS[program]([command, "--help"])


def test_hidden_flags_are_not_proposed() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--owner-fd", help=argparse.SUPPRESS)
    from flashclient.commands.slips import told

    assert told(parser, "unrecognized arguments: --owner-f 3").startswith("unknown flag '--owner-f'; see ")
