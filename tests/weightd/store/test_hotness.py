"""The hot set: kept while windows move, saved from one daemon to the next, predicted by calibration."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from daemon import Daemon, serving
from numpy.typing import NDArray
from tiny_store import TinyModel, write_model

from flashclient.calibration.publishing import publish
from flashclient.daemon.channel import Connection
from flashclient.model.predictor_file import write_tensors
from flashclient.source.ring import RingSource
from weightd import cli
from weightd._native import EngineThread
from weightd.store.hotness import calibrated_hotness, coded, known_hotness
from weightd.store.store import Store
from weightd_proto import weightd_pb2
from weightd_proto.files import PREDICTORS_FILE, REPORT_FILE, STATISTICS_FILE

LAYERS, NEURONS, BUNDLE_BYTES = 2, 1500, 4032  # a bundle fills its cell
HOT = 300  # of each layer: one neuron in five
POOL = 1000  # cells: enough for the hot ones and those that a step wants
WINDOW = 2  # tokens
WITHIN_S = 60.0
NONE = np.empty(0, np.uint32)


@pytest.fixture
def model(tmp_path: Path) -> TinyModel:
    return write_model(tmp_path / "store", layers=LAYERS, neurons=NEURONS, bundle_bytes=BUNDLE_BYTES)


@pytest.fixture
def shares() -> NDArray[np.float32]:
    """The share of tokens that want each neuron, [layers, neurons]: most tokens for some, one in 50 for the others."""
    shares = np.full((LAYERS, NEURONS), 0.02, np.float32)
    random = np.random.default_rng(5)
    for layer in range(LAYERS):
        shares[layer, random.permutation(NEURONS)[:HOT]] = 0.7
    return shares


class Client:
    """A session that wants neurons at random, as often as `shares` says, and keeps those of the last tokens."""

    def __init__(self, daemon: Daemon, shares: NDArray[np.float32], seed: int = 0) -> None:
        self._connection = Connection(daemon.address, 10.0)
        self._source = RingSource(self._connection, self._connection.describe("tiny"))
        self._daemon = daemon
        self._shares = shares
        self._random = np.random.default_rng(seed)
        self._tokens: list[list[NDArray[np.uint32]]] = [[NONE] * (WINDOW + 1) for _ in shares]

    def misses_per_token(self, tokens: int) -> float:
        """Takes so many more tokens. Returns the mean number of cells that they missed."""
        before = self._misses()
        for _ in range(tokens):
            for layer, shares in enumerate(self._shares):
                self._step(layer, np.flatnonzero(self._random.random(NEURONS) < shares).astype(np.uint32))
        return (self._misses() - before) / tokens

    def _step(self, layer: int, wanted: NDArray[np.uint32]) -> None:
        held = np.unique(np.concatenate(self._tokens[layer]))
        self._tokens[layer] = [*self._tokens[layer][1:], wanted]
        kept = np.unique(np.concatenate(self._tokens[layer]))
        self._source.leases.exchange(layer, np.setdiff1d(wanted, held).tolist(), np.setdiff1d(held, kept).tolist())
        while self._source.leases.arrived():
            pass

    def sweep(self) -> None:
        """Wants every neuron once, as exact mode does."""
        for layer in range(LAYERS):
            for _ in self._source.chunks(layer):
                pass
        self._source.idle()

    def _misses(self) -> int:
        return int(stats_of(self._daemon).misses)

    def close(self) -> None:
        self._source.close()
        self._connection.close()


@contextmanager
def using(daemon: Daemon, shares: NDArray[np.float32], seed: int = 0) -> Iterator[Client]:
    client = Client(daemon, shares, seed=seed)
    try:
        yield client
    finally:
        client.close()


def stats_of(daemon: Daemon) -> weightd_pb2.ModelStats:
    stats: weightd_pb2.ModelStats = daemon.stub.Stats(weightd_pb2.StatsRequest()).models[0]
    return stats


def dram(model: TinyModel) -> str:
    record = model.record
    cells = sum(layer.cells for layer in record.layers)
    least = EngineThread.minimum_dram_bytes(record.resident_file_bytes + (1 << 20), 4096, cells, cells)
    return str(least + POOL * 4096)


def write_statistics(folder: Path, record: weightd_pb2.Model, shares: NDArray[np.float32]) -> Path:
    path = folder / STATISTICS_FILE
    tensors: dict[str, NDArray[Any]] = {f"layers.{index}.predicted": layer for index, layer in enumerate(shares)}
    # Earlier versions wrote it, and nothing reads it.
    tensors["layers.0.coactivation"] = np.full((shares.shape[1], 8), -1, np.int32)
    write_tensors(path, tensors, record, {})
    return path


def calibrate(daemon: Daemon, folder: Path, shares: NDArray[np.float32]) -> None:
    folder.mkdir(exist_ok=True)
    connection = Connection(daemon.address, 10.0)
    record = connection.describe("tiny")
    write_statistics(folder, record, shares)
    (folder / PREDICTORS_FILE).write_bytes(b"none")
    (folder / REPORT_FILE).write_text("{}")
    publish(connection, record, "predict", folder, (PREDICTORS_FILE, STATISTICS_FILE, REPORT_FILE))
    connection.close()


def wait_until_warm(daemon: Daemon) -> int:
    """Waits until the pool is full. Returns the cells in it."""
    give_up = time.monotonic() + WITHIN_S
    while time.monotonic() < give_up:
        stats = stats_of(daemon)
        if 0 < stats.slots == stats.slots_filled >= 0.95 * POOL:  # the tables of sessions take some
            return int(stats.slots_filled)
    raise AssertionError(f"not warm after {WITHIN_S} s: {stats_of(daemon)}")


def wait_until_remembered(store: Path) -> None:
    give_up = time.monotonic() + WITHIN_S
    with Store.open(store, readonly=True) as opened:
        while opened.hotness("tiny") is None:
            assert time.monotonic() < give_up, f"nothing was remembered within {WITHIN_S} s"


# ---- the code ----


def test_a_cell_of_the_mean_is_64_and_each_doubling_is_8() -> None:
    uses = np.array([4, 2, 1, 0.5, 0.25, 0.25, 0, 0])
    assert coded(uses).tolist() == [80, 72, 64, 56, 48, 48, 0, 0]
    assert coded(np.zeros(3)).tolist() == [0, 0, 0]
    assert coded(np.array([1e-9] + [1.0] * 99)).tolist() == [1] + [64] * 99


@pytest.mark.parametrize("bundle_bytes", [96, 4032])
def test_a_cell_is_as_hot_as_one_of_its_neurons_being_wanted(tmp_path: Path, bundle_bytes: int) -> None:
    model = write_model(tmp_path / "store", neurons=101, bundle_bytes=bundle_bytes)
    shares = np.random.default_rng(1).beta(0.2, 2, (2, 101)).astype(np.float32)
    shares[0, :7] = 0
    with Store.open(tmp_path / "store") as store:
        record = store.model("tiny")
        assert calibrated_hotness(store, record) is None
        record.calibration.version = 1
        folder = tmp_path / "store" / "tiny" / "calibration" / "1"
        folder.mkdir(parents=True)
        write_statistics(folder, record, shares)
        found = calibrated_hotness(store, record)
    per_cell = model.record.bundle.bundles_per_cell
    wanted = [
        1 - np.prod([1 - float(share) for share in layer[first : first + per_cell]])
        for layer in shares
        for first in range(0, 101, per_cell)
    ]
    assert found is not None
    np.testing.assert_allclose(found.astype(int), coded(np.array(wanted)).astype(int), atol=1)


@pytest.mark.parametrize("fault", ["missing", "short", "no tensor", "other shape", "not numbers"])
def test_statistics_that_cannot_be_used_are_said_and_cost_nothing_else(
    model: TinyModel, tmp_path: Path, shares: NDArray[np.float32], fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Store.open(tmp_path / "store") as store:
        record = store.model("tiny")
        record.calibration.version = 1
        folder = tmp_path / "store" / "tiny" / "calibration" / "1"
        folder.mkdir(parents=True)
        if fault == "no tensor":
            shares = shares[:1]
        if fault == "other shape":
            shares = shares[:, :-1].copy()
        if fault != "missing":
            path = write_statistics(folder, record, shares)
        if fault == "short":
            path.write_bytes(path.read_bytes()[:5000])
        if fault == "not numbers":
            write_statistics(folder, record, np.full_like(shares, np.nan))
        found = calibrated_hotness(store, record)
    if fault == "not numbers":
        assert found is not None
        assert not found.any()
    else:
        assert found is None
        assert "the statistics of the calibration of tiny cannot be used" in caplog.text


def test_what_was_remembered_of_other_cells_is_not_used(model: TinyModel, tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        store.catalog.set_hotness("tiny", bytes(range(100)))
        assert known_hotness(store, store.model("tiny")) is None
        store.catalog.set_hotness("tiny", bytes([7]) * LAYERS * NEURONS)
        remembered = known_hotness(store, store.model("tiny"))
        assert remembered is not None
        assert remembered.tolist() == [7] * LAYERS * NEURONS


def test_removing_a_model_removes_what_was_remembered_of_it(model: TinyModel, tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        store.catalog.set_hotness("tiny", bytes([7]) * LAYERS * NEURONS)
        assert cli.main(["rm", "tiny", "--store", str(tmp_path / "store")]) == 0
        assert store.hotness("tiny") is None


# ---- through a daemon ----


def test_hot_cells_stay_while_windows_move(model: TinyModel, tmp_path: Path, shares: NDArray[np.float32]) -> None:
    with serving(tmp_path / "store", "--dram", dram(model)) as daemon:
        calibrate(daemon, tmp_path / "calibration", shares)
        with using(daemon, shares) as client:
            client.misses_per_token(30)
            misses = client.misses_per_token(30)
            # only what is seldom wanted is read: 0.02 of 1200 neurons in each of two layers, less what the window holds
            assert misses <= 0.02 * LAYERS * (NEURONS - HOT)
            before = stats_of(daemon)
            with using(daemon, shares) as another:
                another.sweep()
            assert stats_of(daemon).misses - before.misses >= LAYERS * NEURONS - before.slots
            assert client.misses_per_token(10) <= 0.02 * LAYERS * (NEURONS - HOT) * 1.5


def test_calibration_foretells_what_is_read_first(
    model: TinyModel, tmp_path: Path, shares: NDArray[np.float32]
) -> None:
    with serving(tmp_path / "store", "--dram", dram(model), "--cold-start") as daemon:
        calibrate(daemon, tmp_path / "calibration", shares)
    with serving(tmp_path / "store", "--dram", dram(model)) as daemon, using(daemon, shares) as client:
        wait_until_warm(daemon)
        assert stats_of(daemon).misses == 0
        assert client.misses_per_token(5) <= 0.02 * LAYERS * (NEURONS - HOT)


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_restarted_daemon_is_as_warm_as_before(
    model: TinyModel, tmp_path: Path, shares: NDArray[np.float32], end: str
) -> None:
    store = tmp_path / "store"
    with serving(store, "--dram", dram(model)) as daemon:
        with using(daemon, shares) as client:
            client.misses_per_token(60)
        with using(daemon, shares, seed=1) as client:
            warm = client.misses_per_token(2)
        if end == "killed":
            wait_until_remembered(store)
            daemon.process.kill()
            daemon.process.wait()
    with serving(store, "--dram", dram(model), "--cold-start") as daemon, using(daemon, shares, seed=2) as client:
        cold = client.misses_per_token(2)
    with serving(store, "--dram", dram(model)) as daemon, using(daemon, shares, seed=2) as client:
        wait_until_warm(daemon)
        restarted = client.misses_per_token(2)
    assert restarted <= 1.2 * warm
    assert restarted < 0.5 * cold


def test_a_cold_start_remembers_and_reads_nothing(
    model: TinyModel, tmp_path: Path, shares: NDArray[np.float32]
) -> None:
    store = tmp_path / "store"
    with Store.open(store) as opened:
        opened.catalog.set_hotness("tiny", bytes([200]) * LAYERS * NEURONS)
    with serving(store, "--dram", dram(model), "--cold-start") as daemon, using(daemon, shares) as client:
        client.misses_per_token(3)
        stats = stats_of(daemon)
        assert stats.slots_filled == stats.misses
    with Store.open(store) as opened:
        remembered = opened.hotness("tiny")
        assert remembered is not None
        assert set(remembered.tolist()) == {200}


def test_what_is_known_already_is_not_written_again(model: TinyModel, tmp_path: Path) -> None:
    """An idle daemon does not change a byte of the catalog."""
    store = tmp_path / "store"
    with Store.open(store) as opened:
        opened.catalog.set_hotness("tiny", bytes([200]) * LAYERS * NEURONS)
    before = (store / "catalog.mdb").read_bytes()
    with serving(store, "--dram", dram(model)):
        pass
    assert (store / "catalog.mdb").read_bytes() == before
