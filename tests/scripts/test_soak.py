"""scripts/soak.py finds no error in weightd, and detects silent clients and corruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from repository import SCRIPTS
from soaking.clients import SILENT_S, SPEAKS_WITHIN_S, Silences
from soaking.comparison import TOKENS_MIN, TURNS, Comparison
from soaking.store import READING_S, Corruption

SCRIPT = SCRIPTS / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_half_a_minute_of_killed_frozen_and_corrupt(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--minutes", "0.5", "--folder", str(tmp_path), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=900, check=False)
    assert done.stdout, f"it ended with status {done.returncode}; its standard error, which pytest shows, says why"
    report = json.loads(done.stdout)
    assert not report["wrong"], "\n".join(report["wrong"])  # what silent clients say is on standard error
    assert done.returncode == 0
    for event in ("generations", "clients killed", "clients frozen", "weightd killed", "corruption errors"):
        assert report["counts"].get(event, 0) > 0, f"no {event} in {report['counts']}"


def test_a_client_that_falls_silent_is_told_of_asked_and_ended() -> None:
    asked = "import signal; signal.signal(signal.SIGUSR1, lambda *_: print('here', flush=True))"
    command = [sys.executable, "-c", f"{asked}; print('ready', flush=True)\nwhile True: signal.pause()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        silences = Silences()
        silences.begin(3, client.pid)
        assert not any(silences.passed(3, SILENT_S / 8) for _ in range(7))
        silences.heard(3)
        told = [silences.passed(3, SILENT_S / 8) for _ in range(9)]
        assert told == [False] * 8 + [True], "once"
        assert client.stdout.readline() == "here\n"
        assert not silences.passed(3, SPEAKS_WITHIN_S)
        assert client.wait() == -signal.SIGKILL


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


def test_a_turn_is_longer_until_it_has_half_of_the_tokens_that_a_percentile_needs() -> None:
    kinds = [("opt", "exact", "shm"), ("llama", "predict", "shm")]
    compared = Comparison()
    for hostile in TURNS:
        compared.begin(hostile)
        for kind in kinds:
            assert not compared.has_enough(kinds)
            compared.take(kind, compared.since_s, [0.01] * (TOKENS_MIN // 2))
        assert compared.has_enough(kinds)
        compared.end()
    assert compared.wrong(kinds) == []
