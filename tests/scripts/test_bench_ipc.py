"""scripts/bench_ipc.py: the engine in the same process gives what weightd gives over the ring."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from benchmarks.ipc_generation import compared
from benchmarks.native_module import bench_native
from planted.store import planted_store
from tiny_store import TinyModel, write_model

from weightd.serving.served_models import model_spec
from weightd.store.store import Store


@pytest.fixture
def tiny(tmp_path: Path) -> TinyModel:
    return write_model(tmp_path)


@pytest.fixture
def engine(tmp_path: Path, tiny: TinyModel) -> Any:
    spec = model_spec(Store.open(tmp_path, readonly=True), tiny.record)
    return bench_native().InProcessEngine(64 << 20, spec, io_engine="auto", io_threads=4, io_depth=8, slots_wanted=2)


def test_both_paths_make_the_same_logits(tmp_path: Path) -> None:
    row = compared(planted_store("opt-tiny", tmp_path), "predict", 1.0, tokens=3)  # raises where they differ
    assert row["shared_memory_over_in_process"] > 0


def test_cells_in_this_process_hold_the_bundles(tiny: TinyModel, engine: Any) -> None:
    engine.exchange(1, [0, 2], [])
    addresses = arrivals(engine)
    assert sorted(addresses) == [0, 2]
    layout = tiny.record.bundle
    for cell, address in addresses.items():
        first = cell * layout.bundles_per_cell
        for place, bundle in enumerate(tiny.bundles[1][first : first + layout.bundles_per_cell]):
            assert ctypes.string_at(address + place * layout.stride_bytes, len(bundle)) == bundle.tobytes()
    assert engine.cells_held == engine.misses == len(addresses)
    engine.exchange(1, [], [0, 2])
    assert engine.cells_held == 0


def test_cancel_keeps_the_cells_that_were_returned(engine: Any) -> None:
    engine.exchange(0, [0], [])
    arrivals(engine)
    engine.exchange(1, [1], [])
    engine.cancel()
    assert engine.cells_held == 1
    engine.exchange(0, [], [0])
    assert engine.cells_held == 0


def test_a_range_is_leased_and_given_back(tiny: TinyModel, engine: Any) -> None:
    for address in engine.lease_range(0, 1, 2).tolist():
        assert address % tiny.record.bundle.cell_bytes == 0
    assert engine.cells_held == 2
    engine.release_range(0, 1, 2)
    assert engine.cells_held == 0


def test_what_is_not_held_cannot_be_given_back(engine: Any) -> None:
    with pytest.raises(ValueError, match="is not held"):
        engine.exchange(0, [], [1])


def arrivals(engine: Any) -> dict[int, int]:
    """Waits for all requested cells. Returns their addresses by cell."""
    addresses: dict[int, int] = {}
    while batch := engine.arrived():
        addresses |= batch
    return addresses
