"""RingSource: cells leased one by one from a real daemon's pool, beside the sweep of exact mode."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from byte_flips import flip_bit
from daemon import Daemon, serving
from numpy.typing import NDArray
from tiny_store import TinyModel, write_model

from flashclient.daemon.channel import Connection
from flashclient.errors import CalibrationError, CorruptionError, DaemonLostError
from flashclient.source.border import LeaseRefusedError
from flashclient.source.ring import RingSource
from weightd_proto import weightd_pb2
from weightd_proto.files import BUNDLES_FILE

NONE = np.empty(0, np.uint32)
NEURONS, BUNDLE_BYTES = 1500, 4032  # a bundle fills its cell


@pytest.fixture
def model(tmp_path: Path) -> TinyModel:
    return write_model(tmp_path / "store", layers=2, neurons=NEURONS, bundle_bytes=BUNDLE_BYTES)


@contextmanager
def opened(folder: Path, dram: str = "64MiB") -> Iterator[tuple[RingSource, Daemon]]:
    with serving(folder / "store", "--dram", dram) as daemon:
        connection = Connection(daemon.address, 10.0)
        source = RingSource(connection, connection.describe("tiny"))
        try:
            yield source, daemon
        finally:
            source.close()
            connection.close()


def cells(*numbers: int) -> NDArray[np.uint32]:
    return np.array(numbers, np.uint32)


def settle(source: RingSource) -> None:
    while source.arrived() > 0:
        pass


def bundle_at(address: int) -> bytes:
    return ctypes.string_at(int(address), BUNDLE_BYTES)


def test_cells_lie_where_the_table_says(model: TinyModel, tmp_path: Path) -> None:
    with opened(tmp_path) as (source, _):
        table = source.addresses(1)
        source.exchange(1, cells(7, 3, 1499), NONE)
        settle(source)
        assert np.flatnonzero(table).tolist() == [3, 7, 1499]
        for cell in (3, 7, 1499):
            assert bundle_at(table[cell]) == model.bundles[1][cell].tobytes()
        source.exchange(1, cells(8), cells(3, 1499))
        settle(source)
        assert np.flatnonzero(table).tolist() == [7, 8]
        assert source.cells_held == 2
        source.idle()
        assert not table.any()
        assert source.cells_held == 0


def test_more_cells_than_a_message_holds(model: TinyModel, tmp_path: Path) -> None:
    every = np.arange(NEURONS, dtype=np.uint32)
    with opened(tmp_path) as (source, _):
        for layer in (0, 1):
            source.exchange(layer, every, NONE)
            settle(source)
            assert [bundle_at(a) for a in source.addresses(layer)] == [row.tobytes() for row in model.bundles[layer]]
            source.exchange(layer, NONE, every)
            assert source.cells_held == 0


def test_more_cells_than_the_grants_of_a_ring(tmp_path: Path) -> None:
    """16384 grants: the rest is asked for as they are read."""
    cells_count = 16384 + 2000
    model = write_model(tmp_path / "store", layers=1, neurons=cells_count, bundle_bytes=BUNDLE_BYTES)
    with opened(tmp_path, dram="128MiB") as (source, _):
        assert source.lease_limit > cells_count - 1
        source.exchange(0, np.arange(cells_count, dtype=np.uint32), NONE)
        settle(source)
        assert source.cells_held == cells_count
        table = source.addresses(0)
        for cell in (0, 16383, 16384, cells_count - 1):
            assert bundle_at(table[cell]) == model.bundles[0][cell].tobytes()


def test_sweeping_and_leasing_take_turns(model: TinyModel, tmp_path: Path) -> None:
    with opened(tmp_path) as (source, daemon):
        for layer in (0, 1):
            source.exchange(layer, cells(5, 6), NONE)
            settle(source)
            first = next(source.chunks(layer))
            assert bundle_at(first.addresses[0]) == model.bundles[layer][0].tobytes()
            assert source.cells_held == 0, "what is swept cannot be what is leased"
        source.idle()
        assert source.counters().hits > 0
        assert daemon.process.poll() is None


def test_leases_beyond_the_limit_are_refused_and_can_be_had_later(model: TinyModel, tmp_path: Path) -> None:
    with opened(tmp_path, dram="9MiB") as (source, _):
        assert source.share_cells <= source.lease_limit < NEURONS
        source.exchange(0, np.arange(NEURONS, dtype=np.uint32), NONE)
        with pytest.raises(LeaseRefusedError):
            settle(source)
        source.idle()
        source.exchange(0, np.arange(source.share_cells, dtype=np.uint32), NONE)
        settle(source)
        assert source.cells_held == source.share_cells


def test_a_corrupt_cell_is_named(model: TinyModel, tmp_path: Path) -> None:
    flip_bit(tmp_path / "store" / "tiny" / BUNDLES_FILE, 9 * 4096)
    with opened(tmp_path) as (source, _):
        source.exchange(0, cells(8, 9, 10), NONE)
        with pytest.raises(CorruptionError, match="layer 0, neuron at position 9 differs"):
            settle(source)
        source.exchange(0, cells(11), NONE)
        settle(source)
        assert np.flatnonzero(source.addresses(0)).tolist() == [8, 10, 11]


def test_a_model_without_calibration_has_no_predictors(model: TinyModel, tmp_path: Path) -> None:
    with opened(tmp_path) as (source, _), pytest.raises(CalibrationError, match="gave no predictors of model 'tiny'"):
        source.predictors()


def test_a_closed_source_holds_nothing(model: TinyModel, tmp_path: Path) -> None:
    with opened(tmp_path) as (source, _):
        source.exchange(0, cells(1), NONE)
        source.close()
        with pytest.raises(DaemonLostError, match="closed during a generation"):
            source.arrived()


def test_a_daemon_that_stops_is_noticed(model: TinyModel, tmp_path: Path) -> None:
    with opened(tmp_path) as (source, daemon):
        source.exchange(0, cells(1), NONE)
        settle(source)
        daemon.stop()
        with pytest.raises(DaemonLostError):
            source.exchange(0, cells(2), NONE)


def test_statistics_tell_who_is_attached_and_what_it_did(model: TinyModel, tmp_path: Path) -> None:
    with opened(tmp_path) as (source, daemon):
        source.exchange(1, cells(7, 3, 1499), NONE)
        settle(source)
        source.exchange(1, NONE, cells(3))
        source.exchange(1, cells(3), NONE)
        settle(source)
        stats = daemon.stub.Stats(weightd_pb2.StatsRequest())
        (row,) = stats.attached
        assert (row.pid, row.uid, row.model) == (os.getpid(), os.getuid(), "tiny")
        assert (row.misses, row.hits, row.read_bytes) == (3, 1, 3 * 4096)
        assert (row.leased_cells, row.requests) == (3, 3)
        assert row.share_slots <= row.lease_limit
        assert 0 < row.age_s <= stats.uptime_s
        assert (stats.models[0].leases, stats.models[0].guaranteed_slots) == (3, row.share_slots)
