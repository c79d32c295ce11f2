"""What `--print-completion` prints: a shell completes commands, flags and choices with it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from flashclient import cli as flashclient
from flashclient.commands.completion import SHELLS
from weightd import cli as weightd

MAINS: dict[str, Callable[[list[str]], int]] = {"flashclient": flashclient.main, "weightd": weightd.main}


def printed(program: str, shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    try:
        status = MAINS[program](["--print-completion", shell])
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("flashclient se", "serve"),
        ("flashclient serve --allow", "--allow-origin"),
        ("flashclient generate --mo", "--mode"),
        ("weightd inst", "install-service"),
        ("weightd import --dt", "--dtype"),
        ("weightd serve --io-e", "--io-engine"),
        ("weightd serve --io-engine io", "io_uring"),
    ],
)
def test_bash_completes(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, last = words.split()[0], words.split()[-1]
    asked = f"COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}; _shtab_{program} {program} {last}"
    script = f'{printed(program, "bash", capsys)}\n{asked}; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout.split(), done.stderr) == (expected.split(), "")


@pytest.mark.parametrize("program", MAINS)
@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_gets_all_commands(program: str, shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(program, shell, capsys)
    for command in ("chat", "serve") if program == "flashclient" else ("import", "top", "serve"):
        assert command in text


@pytest.mark.parametrize("program", MAINS)
def test_another_shell_is_refused_by_name(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert MAINS[program](["--print-completion", "cmd"]) == 2
    said = capsys.readouterr().err
    assert "bash" in said
    assert said.count("\n") == 1
