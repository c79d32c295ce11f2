"""Command lines of the scripts: they start as README names them, have --help, and refuse wrong flags alike."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from repository import ROOT, SCRIPTS

# With the python of this checkout's .venv, whether it is activated or not; without a .venv, with the first in PATH.
SHEBANG = """#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'"""
STARTED_BY_ANOTHER = {"demo.py"}  # by scripts/demo, which installs what it needs first
COMMANDS = sorted(
    path
    for path in SCRIPTS.glob("*.py")
    if '__name__ == "__main__"' in path.read_text() and path.name not in STARTED_BY_ANOTHER
)
QUICK_TO_IMPORT = ("bench_import.py", "bench_reader.py", "hostile_clients.py")  # the others load torch
HELP_OF_EACH = """
import runpy, sys
sys.path[0], *paths = sys.argv[1:]
for path in paths:
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, path
"""
WITH_FLAGS = sorted(path for path in SCRIPTS.glob("*.py") if "FlagParser(__doc__)" in path.read_text())


def named_in_readmes() -> set[str]:
    """Files of scripts/ that README.md and scripts/README.md name as commands."""
    found = set(re.findall(r"\bscripts/([a-z_]+(?:\.py)?)(?![\w/.])", (ROOT / "README.md").read_text()))
    for line in (SCRIPTS / "README.md").read_text().splitlines():
        if line.startswith("| `"):
            found |= set(re.findall(r"`([a-z_]+(?:\.py)?)`", line.split("|")[1]))
    return {name for name in found if not (SCRIPTS / name).is_dir()}


def test_what_readmes_name_can_be_run() -> None:
    names = named_in_readmes()
    assert {"test", "demo", "bench_paper.py", "make_planted_model.py"} <= names
    for name in names:
        assert os.access(SCRIPTS / name, os.X_OK), f"scripts/{name} has no run bit"


def test_commands_start_alike() -> None:
    assert len(COMMANDS) > 10
    for path in COMMANDS:
        assert path.read_text().splitlines()[0] == SHEBANG, path.name
        assert os.access(path, os.X_OK), path.name


def test_no_script_has_a_parser_of_its_own() -> None:
    assert len(WITH_FLAGS) > 10
    for path in SCRIPTS.glob("*.py"):
        assert path.name == "flags.py" or "ArgumentParser(" not in path.read_text(), path.name


def outside(command: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """What a command did that was started in `folder` from a shell with no environment activated."""
    system = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if ".venv" not in part)
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | {"PATH": system}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=folder, timeout=120
    )


@pytest.mark.parametrize("name", QUICK_TO_IMPORT)
def test_it_runs_without_an_activated_environment(name: str, tmp_path: Path) -> None:
    """All scripts start alike, so that those that load torch need not be tried one by one."""
    done = outside([SCRIPTS / name, "--help"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {Path(name).stem} ")


@pytest.mark.slow
def test_each_has_help_and_finds_what_it_imports(tmp_path: Path) -> None:
    """In one process, so that torch is loaded once; the folder of the scripts is the only one that is added."""
    done = outside([sys.executable, "-c", HELP_OF_EACH, SCRIPTS, *COMMANDS], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^usage: (\w+)", done.stdout, re.MULTILINE) == [path.stem for path in COMMANDS]


@pytest.mark.parametrize("path", WITH_FLAGS, ids=lambda path: path.stem)
def test_a_wrong_flag_is_one_line_and_status_2(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--nonsense"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    told = capsys.readouterr()
    last = told.err.splitlines()[-1]
    assert (ended.value.code, told.out) == (2, "")
    assert last.startswith(f"{path.stem}: ")
    assert last.endswith(f"; see {path.stem} --help")
    assert "usage:" not in told.err
