"""scripts/bench_paper.py: the rows run on a tiny planted model, and their numbers are computed correctly."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_paper
import pytest
import torch
from benchmarks.forced_tokens import IDS_SPECIAL, ForcedTokens, random_ids
from benchmarks.processes import BenchError, run_json, serving
from benchmarks.uncached_pass import READ_BYTES, THREADS, read_uncached
from paper.client import Task, run
from paper.figure import draw
from paper.rows import COLD, FIRST_TOKENS, ROWS, Work, costs, summary, unbundled_weightd
from paper.table import PAPER_TABLE_2, tables
from repository import SCRIPTS
from run_here import run_here
from tiny_store import write_model

from flashclient.daemon.channel import Connection
from weightd_proto import weightd_pb2 as pb

SCRIPT = SCRIPTS / "bench_paper.py"
TOKENS = FIRST_TOKENS + 10


def token(seconds: float) -> dict[str, float]:
    """One token's costs, with round numbers."""
    reading = {"reads": 100, "read_bytes": 2e8, "reading_s": 0.1, "again_s": 0.1, "again_bytes": 1e8}
    clock = {"wait_s": 0.1, "compute_s": 0.2, "predict_s": 0.1, "ffn_s": 0.45, "head_s": 0.05, "forward_s": 0.6}
    return reading | clock | {"acquire_s": 0.03, "seconds": seconds}


def told_of(seconds: list[float]) -> dict[str, Any]:
    memory = {"client_bytes": 10**9, "daemon_bytes": 2 * 10**9}
    return {"tokens": [token(one) for one in seconds], "memory": memory, "dram_bytes": 25 * 10**8}


def test_costs_of_tokens() -> None:
    row = costs([token(1.0), token(2.0), token(3.0)])
    assert row["read_gb_per_token"] == pytest.approx(0.3)
    assert row["gb_per_s"] == pytest.approx(1.5)
    assert row["io_ms"] == pytest.approx(200)
    assert row["wait_ms"] == pytest.approx(200)
    assert row["total_ms"] == pytest.approx(2000)
    assert row["attention_ms"] == pytest.approx(100)
    assert row["compute_ms"] == pytest.approx(100 + 50 + 100 + 200)
    assert row["management_ms"] == pytest.approx(2000 - 450 - 200)
    assert row["overhead_share"] == pytest.approx(1.35 / 2)
    assert (row["total_ms_p50"], row["total_ms_p99"]) == (pytest.approx(2000), pytest.approx(2980))


def test_prompt_and_first_tokens_stand_apart() -> None:
    row = summary("all", told_of([9.0] + [2.0] * FIRST_TOKENS + [1.0] * 10))
    assert row["prompt_s"] == 9
    assert row["first_tokens"]["total_ms"] == pytest.approx(2000)
    assert row["total_ms"] == pytest.approx(1000)
    assert row["tokens"] == TOKENS
    assert row["all_memory_gb"] == 3


def test_rows_are_the_papers() -> None:
    assert [plan.name for plan in ROWS][:-1] == list(PAPER_TABLE_2)


def test_tables_stand_beside_the_papers(tmp_path: Path) -> None:
    rows = [summary(plan.name, told_of([1.0] * TOKENS)) for plan in ROWS]
    rows.append({"row": "dense", "total_ms": 400.0})
    text = tables(rows)
    naive = next(line for line in text.splitlines() if line.startswith("naive"))
    assert naive.split() == ["naive", "2.5", "|", "0", "0.3", "|", "13.4", "1.5", "|", "6.1", "200", "|", "2196"]
    paths = draw({"rows": rows}, "a title", tmp_path / "figures" / "paper")
    assert [path.name for path in paths] == ["paper.png", "paper.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert "a title" in paths[1].read_text()


def test_forced_tokens_stop_the_clock() -> None:
    asked: list[int] = []
    forced = ForcedTokens([5, 3], lambda: asked.append(len(forced.seconds)))
    forced.start()
    scores = torch.zeros(1, 8)
    first = forced(torch.zeros(1, 1, dtype=torch.long), scores)
    second = forced(torch.zeros(1, 1, dtype=torch.long), scores)
    assert (int(first.argmax()), int(second.argmax())) == (5, 3)
    assert asked == [1, 2]
    assert all(seconds >= 0 for seconds in forced.seconds)


def test_random_ids_are_the_same_for_all_and_never_special() -> None:
    ids = random_ids(64, 1000, seed=3)
    assert ids == random_ids(64, 1000, seed=3)
    assert ids != random_ids(64, 1000, seed=4)
    assert min(ids) >= IDS_SPECIAL
    assert max(ids) < 64


@pytest.mark.parametrize("size_bytes", [4096, THREADS * READ_BYTES + 8192, 3 * READ_BYTES])
def test_an_uncached_pass_reads_all(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size_bytes))
    assert read_uncached(path) == size_bytes


def test_what_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="the row: no such luck"):
        run_json([sys.executable, "-c", "import sys; sys.exit('no such luck')"], "the row")
    with pytest.raises(BenchError, match="weightd does not serve"), serving(tmp_path / "none", 1 << 30):
        pass


def work_of(store: Path) -> Work:
    return Work(store / "checkpoint", store, "tiny", prompt_tokens=1, new_tokens=1, dense_tokens=1, seed=1)


def test_without_bundling_each_part_is_read_by_a_request_of_its_own(tmp_path: Path) -> None:
    wide = write_model(tmp_path / "store", layers=1, neurons=40, bundle_bytes=3 * 4096)
    program = unbundled_weightd(work_of(tmp_path / "store"))
    positions = [0, 1, 2, 4, *range(10, 40)]  # weightd would read 3 too, as a gap between 2 and 4
    with serving(tmp_path / "store", 64 << 20, COLD, program) as daemon:
        connection = Connection(daemon.address, 60.0)
        wanted = pb.NeuronSet(layer=0, positions=[pb.Range(begin=each, end=each + 1) for each in positions])
        answers = connection.stub.Fetch(pb.FetchRequest(model="tiny", bundles=wanted))
        assert b"".join(answer.data for answer in answers) == wide.bundles[0][positions].tobytes()
        (model,) = connection.stub.Stats(pb.StatsRequest()).models
        connection.close()
    cells = len(positions)
    assert (model.misses, model.reads, model.read_bytes) == (cells, 3 * cells, cells * 3 * 4096)
    assert model.reading_s > 0


def test_rows_without_bundling_need_parts_of_whole_blocks(tmp_path: Path) -> None:
    write_model(tmp_path / "store")
    with pytest.raises(BenchError, match=r"'tiny' has 32 bytes, a block 4096"):
        unbundled_weightd(work_of(tmp_path / "store"))


def test_memory_is_a_share_of_the_model_of_16_bit(tmp_path: Path) -> None:
    write_model(tmp_path / "store")
    work = replace(work_of(tmp_path / "store"), whole_bytes=4 << 30)
    assert (work.dram_bytes("half"), work.dram_bytes("quarter")) == (2 << 30, 1 << 30)


def test_quantised_rows_are_compared_with_those_of_16_bit() -> None:
    times = {"all": 100.0, "all, int8": 50.0, "all, int8, a quarter": 80.0, "all, int4": 25.0}
    rows: list[Any] = [{"row": name, "total_ms": one, "overhead_share": 0.01} for name, one in times.items()]
    facts: list[Any] = [{"fio_sequential_gb_per_s": 1.0}, {"over_memory_ratio": 0.9}]
    targets = {one.name: (one.value, one.target) for one in bench_paper.targets_of(rows, facts)}
    assert targets["int8_over_16_bit_ratio"] == (2.0, 1.8)
    assert targets["int4_over_16_bit_ratio"] == (4.0, 2.5)
    assert targets["int8_with_a_quarter_over_16_bit_with_half_ratio"] == (1.25, 1.0)
    assert "int4_with_a_quarter_over_16_bit_with_half_ratio" not in targets


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The benchmark's folder and what it printed, for the rows that such small bundles allow. It measures briefly."""
    folder = tmp_path_factory.mktemp("bench")
    command = [str(SCRIPT), "--shape", "opt-tiny", "--folder", str(folder), "--json", "--no-peers"]
    command += ["--rows", "naive", "hybrid", "all", "--figures", str(folder)]
    command += ["--prompt-tokens", "8", "--dense-tokens", "3", "--tokens", "80"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_paper, "COMPARED", ("naive",))
        patch.setattr(bench_paper, "FIO_SECONDS", 1.0)
        patch.setattr("bench_kernels.BUFFER_BYTES_MIN", 64 << 20)
        patch.setattr("bench_kernels.last_level_cache_bytes", lambda: 16 << 20)
        done = run_here(bench_paper.main, *command)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.slow
def test_rows_run(measured: tuple[Path, dict[str, Any]]) -> None:
    folder, result = measured
    naive, hybrid, everything, fio, _ = result["rows"]
    resident_bytes = (folder / "store-opt-tiny/planted-opt-tiny/resident.safetensors").stat().st_size
    assert naive["read_gb_per_token"] * 1e9 >= resident_bytes
    assert hybrid["read_gb_per_token"] < naive["read_gb_per_token"]
    assert everything["predict_ms"] > 0
    assert everything["compute_ms"] + everything["wait_ms"] + everything["management_ms"] == pytest.approx(
        everything["total_ms"]
    )
    assert all(layer["predicted"] == pytest.approx(0.1, rel=0.1) for layer in everything["layers"])
    assert fio["fio_sequential_gb_per_s"] > 0
    assert (folder / "paper-opt-tiny.svg").exists()


@pytest.mark.slow
def test_targets_are_those_that_were_measured(measured: tuple[Path, dict[str, Any]]) -> None:
    _, result = measured
    names = [target["name"] for target in result["targets"]]
    assert [name for name in names if not name.startswith("io_")] == [
        "naive_over_fio_sequential_ratio",
        "kernel_over_memory_bandwidth_ratio",
        "layers_as_planned_share",
        "overhead_share",
    ]


@pytest.mark.slow
def test_the_timed_tokens_fire_as_planned(measured: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = measured
    with serving(folder / "store-opt-tiny", 80 << 20) as daemon:
        name = "planted-opt-tiny"
        planted = str(folder / name)
        task = Task(daemon.address, name, daemon.pid, 8, 200, 1, {"mode": "exact"}, checkpoint=planted)
        told = run(task)
    assert len(told["tokens"]) == 200
    assert told["memory"]["client_bytes"] > 0
    firing = told["firing"]
    assert len(firing["layers"]) == 4
    assert firing["as_planned_share"] == 1
    assert all(layer["false_negatives"] < 0.08 for layer in firing["layers"])
