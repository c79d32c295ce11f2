"""scripts/soak.py finds nothing wrong, and finds what is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from soak_store import READING_S, Corruption

SCRIPT = Path(__file__).parent.parent / "scripts" / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_minutes_of_killed_frozen_and_corrupt(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--minutes", "2", "--folder", str(tmp_path), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=900, check=False)
    assert done.stdout, f"it ended with status {done.returncode}; its standard error, which pytest shows, says why"
    report = json.loads(done.stdout)
    assert not report["wrong"], "\n".join(report["wrong"])  # what silent clients say is on standard error
    assert done.returncode == 0
    for event in ("generations", "clients killed", "clients frozen", "weightd killed", "corruption errors"):
        assert report["counts"].get(event, 0) > 0, f"no {event} in {report['counts']}"


def test_an_error_is_explained_by_the_bundle_that_it_names_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "bundles.bin"
    path.write_bytes(bytes(64))
    made = Corruption("opt", 2, 17, 5, path, 8, b"original", begin_s=10.0)
    says = "opt: layer 2, neuron at position 17 differs from its checksum: import the model again"
    assert made.explains("opt", says, 9.0, 11.0)
    assert made.explains("opt", "model opt, layer 2, neuron 5: the bundle differs", 11.0, 12.0)
    assert not made.explains("opt", says.replace("17", "18"), 9.0, 11.0)
    assert not made.explains("opt", says.replace("layer 2", "layer 3"), 9.0, 11.0)
    assert not made.explains("llama", says, 9.0, 11.0)
    assert not made.explains("opt", says, 8.0, 9.0), "before it was made"
    made.repair()
    assert path.read_bytes()[8:16] == b"original"
    assert not made.explains("opt", says, made.end_s + READING_S + 1, made.end_s + READING_S + 2), (
        "after it was repaired"
    )
