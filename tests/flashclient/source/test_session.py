"""RingSource: single cells leased from a real daemon's pool, and the sweep of exact mode."""

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
from tiny_store import TinyModel, write_model

from flashclient import _native
from flashclient.daemon.channel import Connection, SessionLostError
from flashclient.errors import CalibrationError, CorruptionError, DaemonLostError
from flashclient.source.ring import RingSource
from weightd_proto import weightd_pb2
from weightd_proto.encodings import plain
from weightd_proto.files import BUNDLES_FILE

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


def settle(source: RingSource) -> dict[int, int]:
    """Waits for all requested cells. Returns the addresses of those that were granted."""
    addresses: dict[int, int] = {}
    while arrived := source.leases.arrived():
        addresses |= dict(arrived)
    return {cell: address for cell, address in addresses.items() if address != 0}


def bundle_at(address: int) -> bytes:
    return ctypes.string_at(address, BUNDLE_BYTES)


def leased(daemon: Daemon) -> int:
    """The number of cells that weightd counts as leased. It may not have processed the last releases yet."""
    count: int = daemon.stub.Stats(weightd_pb2.StatsRequest()).models[0].leases
    return count


def test_cells_lie_where_they_are_said_to(model: TinyModel, tmp_path: Path) -> None:
    with opened(tmp_path) as (source, daemon):
        source.leases.exchange(1, [7, 3, 1499], [])
        held = settle(source)
        assert sorted(held) == [3, 7, 1499]
        for cell, address in held.items():
            assert bundle_at(address) == model.bundles[1][cell].tobytes()
        source.leases.exchange(1, [8], [3, 1499])
        assert list(settle(source)) == [8]
        assert leased(daemon) == 2
        source.leases.exchange(1, [], [7, 8])
        assert source.leases.arrived() == []


def test_more_cells_than_a_message_holds(model: TinyModel, tmp_path: Path) -> None:
    every = list(range(NEURONS))
    with opened(tmp_path) as (source, daemon):
        for layer in (0, 1):
            source.leases.exchange(layer, every, [])
            held = settle(source)
            assert [bundle_at(held[cell]) for cell in every] == [row.tobytes() for row in model.bundles[layer]]
            source.leases.exchange(layer, [], every)
        source.leases.exchange(0, [5], [])
        settle(source)
        assert leased(daemon) == 1


def test_more_cells_than_the_grants_of_a_ring(tmp_path: Path) -> None:
    """The ring has room for 16384 grants. More cells are requested when grants have been read."""
    cells_count = 16384 + 2000
    model = write_model(tmp_path / "store", layers=1, neurons=cells_count, bundle_bytes=BUNDLE_BYTES)
    with opened(tmp_path, dram="128MiB") as (source, _):
        assert source.leases.lease_limit() > cells_count - 1
        source.leases.exchange(0, list(range(cells_count)), [])
        held = settle(source)
        assert len(held) == cells_count
        for cell in (0, 16383, 16384, cells_count - 1):
            assert bundle_at(held[cell]) == model.bundles[0][cell].tobytes()


def test_sweeping_and_leasing_take_turns(model: TinyModel, tmp_path: Path) -> None:
    with opened(tmp_path) as (source, daemon):
        for layer in (0, 1):
            source.leases.exchange(layer, [5, 6], [])
            settle(source)
            assert leased(daemon) == 2, "what is swept cannot be what is leased"
            source.leases.exchange(layer, [], [5, 6])
            first = next(source.chunks(layer))
            assert bundle_at(int(first.addresses[0])) == model.bundles[layer][0].tobytes()
        source.idle()
        assert source.counters().hits > 0
        assert daemon.process.poll() is None


def test_a_window_is_empty_while_chunks_are_read(model: TinyModel, tmp_path: Path) -> None:
    """A window whose step wants neurons 5 and 6."""
    with opened(tmp_path) as (source, daemon):
        window = source.open_window(4)
        kernels = _native.Ffn(_native.Workers(1), [plain("F32")] * 3, 336, "relu")
        bias = np.full(NEURONS, -1, np.float32)
        bias[5:7] = 1
        zeros = np.zeros((1, 336), np.float32), np.zeros((NEURONS, 1), np.float32)
        predictor = _native.LowRankPredictor(_native.Workers(1), "F32", *zeros, bias)
        step = _native.PredictStep(kernels, window, [predictor, predictor])
        for layer in (0, 1):
            x, y = np.ones((1, 336), np.float32), np.empty((1, 336), np.float32)
            step.run(layer, 0, 1, 1, None, x, y)
            assert window.cells_held == leased(daemon) == 2
            next(source.chunks(layer))
            assert window.cells_held == 0
        source.idle()


def test_leases_beyond_the_limit_are_refused_and_can_be_had_later(model: TinyModel, tmp_path: Path) -> None:
    with opened(tmp_path, dram="9MiB") as (source, _):
        leases = source.leases
        share = leases.share_slots()
        assert share <= leases.lease_limit() < NEURONS
        leases.exchange(0, list(range(NEURONS)), [])
        held = settle(source)
        assert share <= len(held) < NEURONS
        leases.exchange(0, [], list(held))
        leases.exchange(0, list(range(share)), [])
        assert len(settle(source)) == share


def test_what_is_on_its_way_can_be_given_back(model: TinyModel, tmp_path: Path) -> None:
    with opened(tmp_path) as (source, daemon):
        source.leases.exchange(0, list(range(100)), [])
        source.leases.cancel()
        assert source.leases.arrived() == []
        source.leases.exchange(0, [1], [])
        settle(source)
        assert leased(daemon) == 1


def test_a_corrupt_cell_is_named(model: TinyModel, tmp_path: Path) -> None:
    flip_bit(tmp_path / "store" / "tiny" / BUNDLES_FILE, 9 * 4096)
    with opened(tmp_path) as (source, daemon):
        source.leases.exchange(0, [9], [])
        match = "layer 0, neuron at position 9 differs"
        with pytest.raises(CorruptionError, match=match), source.errors:
            settle(source)
        source.leases.cancel()
        source.leases.exchange(0, [8, 10, 11], [])
        assert sorted(settle(source)) == [8, 10, 11]
        assert leased(daemon) == 3


def test_a_model_without_calibration_has_no_predictors(model: TinyModel, tmp_path: Path) -> None:
    with opened(tmp_path) as (source, _), pytest.raises(CalibrationError, match="gave no predictors of model 'tiny'"):
        source.predictors()


def test_a_closed_source_holds_nothing(model: TinyModel, tmp_path: Path) -> None:
    with opened(tmp_path) as (source, _):
        source.leases.exchange(0, [1], [])
        source.close()
        with pytest.raises(SessionLostError, match="closed") as lost, source.errors:
            source.leases.arrived()
        with pytest.raises(DaemonLostError, match="closed during a generation"):
            source.reattach(lost.value)


class InterruptedSession:
    """Raises what a signal handler would, right after another session has been opened."""

    def __init__(self, session: _native.Session) -> None:
        self._session = session

    def attach(self, data_socket: str, token: bytes) -> None:
        self._session.attach(data_socket, token)
        raise KeyboardInterrupt


def test_nothing_of_a_lost_session_is_asked_of_the_next(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as (source, daemon):
        list(source.chunks(0))
        source.leases.exchange(0, list(range(100)), [])
        with monkeypatch.context() as patch:
            patch.setattr(source, "_session", InterruptedSession(source._session))
            with pytest.raises(KeyboardInterrupt):
                source.reattach(SessionLostError("weightd is gone"))
        source.leases.cancel()
        source.idle()
        source.leases.exchange(1, [7, 3], [])
        assert sorted(settle(source)) == [3, 7]
        assert leased(daemon) == 2
        source.leases.exchange(1, [], [7, 3])
        assert sum(len(chunk.addresses) for chunk in source.chunks(1)) == NEURONS


def test_a_daemon_that_stops_is_noticed(model: TinyModel, tmp_path: Path) -> None:
    with opened(tmp_path) as (source, daemon):
        source.leases.exchange(0, [1], [])
        settle(source)
        daemon.stop()
        with pytest.raises(DaemonLostError), source.errors:
            source.leases.exchange(0, [2], [])


def test_statistics_tell_who_is_attached_and_what_it_did(model: TinyModel, tmp_path: Path) -> None:
    with opened(tmp_path) as (source, daemon):
        source.leases.exchange(1, [7, 3, 1499], [])
        settle(source)
        source.leases.exchange(1, [], [3])
        source.leases.exchange(1, [3], [])
        settle(source)
        stats = daemon.stub.Stats(weightd_pb2.StatsRequest())
        (row,) = stats.attached
        assert (row.pid, row.uid, row.model) == (os.getpid(), os.getuid(), "tiny")
        assert (row.misses, row.hits, row.read_bytes) == (3, 1, 3 * 4096)
        assert (row.leased_cells, row.requests) == (3, 3)
        assert row.share_slots <= row.lease_limit
        assert 0 < row.age_s <= stats.uptime_s
        assert (stats.models[0].leases, stats.models[0].share_slots) == (3, row.share_slots)
