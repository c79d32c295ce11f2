"""scripts/bench_sharing.py: processes that share, on a tiny planted model."""

from __future__ import annotations

import json
import os
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import bench_sharing
import pytest
from bench_sharing import Client, averaged, counts_of, process_bytes, shared_bytes, targets_of
from benchmarks.processes import BenchError
from benchmarks.sharing_client import Task
from repository import SCRIPTS
from run_here import run_here

SCRIPT = SCRIPTS / "bench_sharing.py"


def rows(folder: Path, *more: str) -> list[dict[str, Any]]:
    command = [str(SCRIPT), "--shape", "opt-tiny", "--folder", str(folder), "--json", "--once", *more]
    command += ["--tokens", "6", "--prompt-tokens", "8"]
    done = run_here(bench_sharing.main, *command)
    assert done.returncode == 0, done.stderr
    result: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return result


@pytest.mark.slow
@pytest.mark.timeout(900)  # seven processes that load torch
def test_clients_share_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, apart = exact = rows(tmp_path, "--clients", "1,2", "--modes", "exact")
    assert [(row["mode"], row["daemons"], row["clients"]) for row in exact] == [
        ("exact", *which) for which in (("one", 1), ("one", 2), ("one each", 2))
    ]
    assert two["slots_filled"] <= one["slots_filled"] * 1.01, "a neuron has more than one slot"
    assert apart["flash_gb"] > 1.5 * two["flash_gb"]
    assert apart["memory_gb"] > two["memory_gb"]
    assert len(two["tokens_per_s_each"]) == 2
    monkeypatch.setattr(bench_sharing, "runtime_bytes", lambda counts: dict.fromkeys(counts, 0.0))
    (predict,) = rows(tmp_path, "--clients", "1", "--modes", "predict")
    assert (predict["mode"], predict["clients"]) == ("predict", 1)
    assert predict["tokens_per_s"] > 0


def row_of(mode: str, clients: int, **values: Any) -> dict[str, Any]:
    rest = {"memory_gb": 1.0, "runtime_gb": 0.5, "flash_gb": 1.0, "slots_filled": 7, "tokens_per_s": 1.0}
    return {"mode": mode, "daemons": "one", "clients": clients, "slowest_over_fastest": 1.0} | rest | values


def test_targets_take_the_worse_mode() -> None:
    rows = [row_of(mode, clients) for mode in ("exact", "predict") for clients in (1, 4)]
    rows[3] |= {"memory_gb": 3.0, "runtime_gb": 2.0, "flash_gb": 1.5, "tokens_per_s": 0.9}
    values = {target.name: (target.value, target.met) for target in targets_of(rows)}
    assert values["memory_4_over_1_ratio"] == (2.0, False)
    assert values["flash_bytes_4_over_1_ratio"] == (1.5, False)
    assert values["tokens_per_s_4_over_1_ratio"] == (0.9, False)
    assert values["slots_4_over_1_ratio"] == (1.0, True)


def test_averages_are_by_place() -> None:
    rows = [{"clients": 2, "flash_gb": 1.0, "each": [1.0, 2.0]}, {"clients": 2, "flash_gb": 3.0, "each": [3.0, 4.0]}]
    assert averaged(rows) == {"clients": 2, "flash_gb": 2.0, "each": [2.0, 3.0]}


def test_memory_is_counted_once() -> None:
    descriptor = os.memfd_create("counted")
    again = os.dup(descriptor)
    before = shared_bytes(os.getpid())
    os.write(descriptor, bytes(1 << 20))
    assert shared_bytes(os.getpid()) - before == 1 << 20
    assert process_bytes(os.getpid()) > 1 << 20
    os.close(descriptor)
    os.close(again)


def test_a_client_that_fails_says_why(tmp_path: Path) -> None:
    client = Client(Task(f"unix:{tmp_path}/none", "model", "exact", 1, 1, 0))
    with pytest.raises(BenchError, match="a client ended: sharing_client: "):
        client.told()
    client.close()


@pytest.mark.parametrize("text", ["4,1", "0", "1,1"])
def test_numbers_of_clients_rise(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="rising numbers: use 1,2,4"):
        counts_of(text)
