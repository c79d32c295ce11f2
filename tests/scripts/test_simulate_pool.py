"""scripts/simulate_pool.py: policies against hand-made cases and each other, traces against what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks.native_module import bench_native
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from repository import SCRIPTS
from simulation.policies import POLICIES, Policy
from simulation.traces import LRU_HITS, Trace, dense, mixture, neurons, recorded

SCRIPT = SCRIPTS / "simulate_pool.py"
TEXTBOOK = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]  # Belady, Nelson and Shedler, 1969


def pool(cells: Trace, slots: int) -> NDArray[np.bool_]:
    hits: NDArray[np.uint8] = bench_native().replay(cells.reshape(-1, 1), int(cells.max()) + 1, slots)
    found: NDArray[np.bool_] = hits == 1
    return found


ALL: dict[str, Policy] = POLICIES | {"weightd": pool}


@pytest.mark.parametrize(("name", "hits"), [("LRU", 2), ("Belady", 5)])
def test_policies_on_the_sequence_of_the_textbooks(name: str, hits: int) -> None:
    assert POLICIES[name](np.array(TEXTBOOK, np.uint32), 3).sum() == hits


@pytest.mark.parametrize("name", ALL)
def test_what_never_returns_is_never_found(name: str) -> None:
    assert not ALL[name](np.arange(100, dtype=np.uint32), 8).any()


@pytest.mark.parametrize("name", ["LRU", "frequency", "Belady", "S3-FIFO", "weightd"])
def test_a_pool_for_everything_misses_each_cell_once(name: str) -> None:
    cells = np.tile(np.arange(20, dtype=np.uint32), 3)
    assert ALL[name](cells, 20).tolist() == [False] * 20 + [True] * 40


@pytest.mark.parametrize("name", [name for name in ALL if name != "Belady"])
@given(cells=st.lists(st.integers(0, 9), min_size=1, max_size=80), slots=st.integers(1, 9))
@example(cells=[0, 1, 0, 1], slots=1)
@settings(max_examples=30, deadline=None)
def test_no_policy_beats_the_one_that_knows_the_future(name: str, cells: list[int], slots: int) -> None:
    trace = np.array(cells, np.uint32)
    assert ALL[name](trace, slots).sum() <= POLICIES["Belady"](trace, slots).sum()


@pytest.mark.parametrize("popularity", [0.0, 0.6])
def test_a_mixture_has_the_published_locality(popularity: float) -> None:
    trace = mixture(layers=1, experts=64, chosen=8, tokens=1500, popularity=popularity)
    for share, hits in LRU_HITS[:-1]:
        measured = POLICIES["LRU"](trace.reshape(-1), round(64 * share))[len(trace) :].mean()
        assert abs(measured - hits) < 0.03


def test_a_row_of_a_mixture_names_different_experts_of_one_layer() -> None:
    trace = mixture(layers=3, experts=8, chosen=4, tokens=50)
    assert trace.shape == (150, 4)
    assert all(len(set(row)) == 4 for row in trace.tolist())
    assert (trace.reshape(50, 3, 4) // 8 == np.arange(3)[None, :, None]).all()


def test_dense_and_predicted_traces_cover_their_cells() -> None:
    assert sorted(set(dense(2, 32, 3).reshape(-1).tolist())) == list(range(64))
    trace = neurons(2, 100, 5)
    assert (trace.reshape(5, 2, -1) // 100 == np.arange(2)[None, :, None]).all()


def test_the_pool_counts_a_repetition_in_a_row_once() -> None:
    rows = np.array([[1, 2, 2], [2, 1, 1]], np.uint32)
    assert bench_native().replay(rows, 3, 2).tolist() == [0, 0, 2, 1, 1, 2]


def test_a_recorded_trace_of_another_kind_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "trace.npy", np.zeros(3, np.int64))
    done = subprocess.run([sys.executable, str(SCRIPT), "--trace", str(tmp_path / "trace.npy")], capture_output=True)
    assert done.returncode == 1
    assert b"not uint32" in done.stderr
    np.save(tmp_path / "trace.npy", np.zeros((3, 2), np.uint32))
    assert recorded(tmp_path / "trace.npy").shape == (3, 2)


def test_the_script_compares_on_every_trace() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--tokens", "8", "--json"], capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 12
    assert all(row[name] <= row["Belady"] + 1e-9 for row in rows for name in ("LRU", "weightd", "S3-FIFO"))
