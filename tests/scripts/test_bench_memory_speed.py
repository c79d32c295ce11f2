"""scripts/bench_memory_speed.py: a tiny model that takes turns with transformers' own, and what its rows say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from bench_memory_speed import LLAMA, OURS, Worker, row_of, targets_of
from repository import SCRIPTS


@pytest.mark.slow
def test_a_run_without_peers(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "bench_memory_speed.py"), "--shape", "llama-tiny"]
    flags = ["--folder", str(tmp_path), "--no-peers", "--rounds", "1", "--tokens", "3", "--prompt-tokens", "20"]
    done = subprocess.run([*command, *flags, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (row,) = result["rows"]
    assert 0 < row["outside_kernels_share"] < 1
    assert row["messages_per_layer"] == 0, "all of the model is leased after the prompt"
    assert row["prompt_s"] > 0
    assert {target["name"] for target in result["targets"]} == {"messages_per_layer", "outside_kernels_share"}


def worker(name: str, seconds: list[float], prompt_s: float) -> Worker:
    return Worker(name, cast(Any, None), seconds=seconds, prompt_s=[prompt_s])


def test_rows_are_medians_over_the_turns() -> None:
    ours = worker(OURS, [0.1, 0.5, 0.2], 4.0)
    ours.kernel_s, ours.messages = [0.9, 0.5, 0.8], [0.0, 48.0, 24.0]
    rows = [row_of(one, 2 * 10**9, 20.0, layers=24) for one in (ours, worker(LLAMA, [0.16, 0.18, 0.17], 3.0))]
    assert rows[0]["gb_per_s"] == pytest.approx(10)
    assert rows[0]["over_memory_ratio"] == pytest.approx(0.5)
    values = {target.name: target.value for target in targets_of(rows)}
    assert values == pytest.approx(
        {
            "messages_per_layer": 1,
            "outside_kernels_share": 0.2,
            "exact_over_llama_cpp_ratio": 0.85,
            "prompt_over_llama_cpp_ratio": 0.75,
        }
    )
