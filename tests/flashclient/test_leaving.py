"""A process with a client ends without messages and with the right status: at any moment, with threads and children."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from daemon import serving
from repository import FIXTURES

from weightd import cli

STATUS = {"exit_in_a_callback": 3, "exit_at_once_while_a_thread_generates": 3}  # the others have status 0


@pytest.mark.timeout(180)
def test_every_way_to_leave_is_quiet(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "tensors", layers=3, neurons=2048, max_position_embeddings=8192)
    assert cli.main(["import", str(folder), "--store", str(tmp_path / "store"), "--name", "tiny"]) == 0
    with serving(tmp_path / "store") as daemon:
        script = [sys.executable, "-W", "ignore", str(FIXTURES / "leaving.py"), daemon.address, "tiny"]
        done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {way: [STATUS.get(way, 0), []] for way in told}
    assert len(told) == 10
