"""Command lines of the scripts: each refuses a wrong one alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from repository import SCRIPTS

WITH_FLAGS = sorted(path for path in SCRIPTS.glob("*.py") if "FlagParser(__doc__)" in path.read_text())
SLOW_TO_IMPORT = {"bench_paper.py", "ship_demo_model.py", "train_demo_model.py"}  # matplotlib, torch


def test_no_script_has_a_parser_of_its_own() -> None:
    assert len(WITH_FLAGS) > 10
    for path in SCRIPTS.glob("*.py"):
        assert path.name == "flags.py" or "ArgumentParser(" not in path.read_text(), path.name


@pytest.mark.parametrize("path", [path for path in WITH_FLAGS if path.name not in SLOW_TO_IMPORT], ids=lambda p: p.stem)
def test_a_wrong_flag_is_one_line_and_status_2(path: Path) -> None:
    done = subprocess.run([sys.executable, path, "--nonsense"], capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, done.stdout) == (2, "")
    assert last.startswith(f"{path.stem}: ")
    assert last.endswith(f"; see {path.stem} --help")
    assert "usage:" not in done.stderr
