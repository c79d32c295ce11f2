"""soak_serve.py for some seconds."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from repository import ROOT


def test_a_short_soak(tmp_path: Path) -> None:
    command = [
        str(ROOT / "scripts" / "soak_serve.py"),
        "--json",
        "--minutes",
        "0.05",
        "--clients",
        "40",
        "--shape",
        "llama-tiny",
    ]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    (row,) = told["rows"]
    assert row["answers"] > 0
    assert row["refused"] > 0
    assert {target["name"] for target in told["targets"] if not target["met"]} <= {"left_in_the_middle"}, done.stderr
