"""A device that fails: one named test per fault, on a real daemon that reads a file system which fails on purpose.

A read that fails, or whose bytes are wrong, is repeated once, each cell alone. If it fails again, the callers that
requested the cell get an error that names model, layer and neuron. The next request reads again.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from byte_flips import flip_bit
from daemon import Daemon, refused, serving
from failing_disk import FailingDisk, Rule, failing_disk
from tiny_store import RESIDENT_BYTES, TinyModel, write_model

from flashclient.daemon.channel import Connection
from flashclient.errors import CorruptionError, DaemonLostError
from flashclient.source.ring import RingSource
from weightd.store.store import RESIDENT_FILE
from weightd_proto import weightd_pb2 as pb
from weightd_proto.files import BUNDLES_FILE

NEURONS, BUNDLE_BYTES, CELL_BYTES = 300, 4032, 4096
ENGINES = ("io_uring", "threads")
NONE = np.empty(0, np.uint32)
ANSWER_S = 30  # much longer than any answer takes here; a test that waits so long has failed


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def model(store: Path) -> TinyModel:
    return write_model(store, neurons=NEURONS, bundle_bytes=BUNDLE_BYTES)


@pytest.fixture
def disk(store: Path, model: TinyModel) -> Iterator[FailingDisk]:
    """The disk of `tiny`."""
    with failing_disk(store / "tiny") as mounted:
        yield mounted


@pytest.fixture(params=ENGINES)
def daemon(store: Path, disk: FailingDisk, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    with serving(store, "--dram", "64MiB", "--cold-start", "--io-engine", request.param) as started:
        yield started
        disk.heal()  # weightd cannot end while a read hangs


def cell(layer: int, neuron: int, kind: str, times: int = 1 << 62) -> Rule:
    begin = (layer * NEURONS + neuron) * CELL_BYTES
    return Rule(BUNDLES_FILE, kind, begin, begin + CELL_BYTES, times)


def fetch(daemon: Daemon, layer: int, *neurons: int, name: str = "tiny", timeout_s: float = ANSWER_S) -> bytes:
    wanted = pb.FetchRequest(model=name, bundles=pb.NeuronSet(layer=layer, neurons=neurons))
    return b"".join(part.data for part in daemon.stub.Fetch(wanted, timeout=timeout_s))


def bundles(model: TinyModel, layer: int, *neurons: int) -> bytes:
    return model.bundles[layer][list(neurons)].tobytes()


def refusal(daemon: Daemon, layer: int, *neurons: int) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        fetch(daemon, layer, *neurons)
    return caught.value.code(), caught.value.details() or ""


@contextmanager
def source_of(daemon: Daemon, name: str = "tiny", timeout_s: float = ANSWER_S) -> Iterator[RingSource]:
    connection = Connection(daemon.address, timeout_s)
    source = RingSource(connection, connection.describe(name))
    try:
        yield source
    finally:
        source.close()
        connection.close()


def lease(source: RingSource, layer: int, *cells: int) -> bytes:
    addresses: dict[int, int] = {}
    with source.errors:
        source.leases.exchange(layer, cells, [])
        while arrived := source.leases.arrived():
            addresses |= dict(arrived)
    return b"".join(ctypes.string_at(addresses[number], BUNDLE_BYTES) for number in cells)


def read_errors(daemon: Daemon) -> int:
    return sum(each.read_errors for each in daemon.stub.Stats(pb.StatsRequest()).models)


# Errors of the device


def test_a_read_error_that_passes_is_not_noticed(daemon: Daemon, disk: FailingDisk, model: TinyModel) -> None:
    disk.add(cell(1, 7, "error", times=1))
    assert fetch(daemon, 1, *range(4, 12)) == bundles(model, 1, *range(4, 12))
    disk.add(cell(0, 7, "error", times=1))
    with source_of(daemon) as source:
        assert lease(source, 0, 5, 6, 7, 8) == bundles(model, 0, 5, 6, 7, 8)
    assert read_errors(daemon) == 0


def test_a_read_error_that_stays_names_model_layer_and_neuron(
    daemon: Daemon, disk: FailingDisk, model: TinyModel
) -> None:
    disk.add(cell(1, 7, "error"))
    status, details = refusal(daemon, 1, *range(4, 12))
    assert status is grpc.StatusCode.DATA_LOSS
    assert "model tiny, layer 1, neuron 7: the bundle cannot be read: Input/output error" in details
    assert fetch(daemon, 1, 4, 5, 6, 8, 9, 10, 11) == bundles(model, 1, 4, 5, 6, 8, 9, 10, 11)
    with source_of(daemon) as source:
        with pytest.raises(CorruptionError, match="tiny: layer 1, neuron at position 7 cannot be read: Input/output"):
            lease(source, 1, 6, 7, 8)
        assert lease(source, 1, 6, 8) == bundles(model, 1, 6, 8)
        assert read_errors(daemon) > 0
        disk.heal()
        assert lease(source, 1, 7) == bundles(model, 1, 7)


def test_short_reads_are_read_on(daemon: Daemon, disk: FailingDisk, model: TinyModel) -> None:
    disk.add(Rule(BUNDLES_FILE, "short"))
    assert fetch(daemon, 0, *range(NEURONS)) == bundles(model, 0, *range(NEURONS))
    with source_of(daemon) as source:
        assert lease(source, 1, *range(40, 90)) == bundles(model, 1, *range(40, 90))


def test_a_read_error_of_resident_weights_that_passes_is_not_noticed(
    daemon: Daemon, disk: FailingDisk, model: TinyModel
) -> None:
    disk.add(Rule(RESIDENT_FILE, "error", RESIDENT_BYTES // 2, RESIDENT_BYTES // 2 + 1, times=1))
    with source_of(daemon) as source:
        assert source.resident.tobytes()[:RESIDENT_BYTES] == model.resident


def test_a_read_error_of_resident_weights_that_stays_is_one_line(
    daemon: Daemon, disk: FailingDisk, model: TinyModel
) -> None:
    disk.add(Rule(RESIDENT_FILE, "error", 4096, 4097))
    with pytest.raises(CorruptionError, match=r"tiny/resident\.safetensors cannot be read: Input/output error"):
        source_of(daemon).__enter__()
    disk.heal()
    with source_of(daemon) as source:
        assert source.resident.tobytes()[:RESIDENT_BYTES] == model.resident


# A device that becomes slow


def test_a_slow_device_holds_up_no_other_models_clients(
    store: Path, model: TinyModel, disk: FailingDisk, request: pytest.FixtureRequest
) -> None:
    """More reads of `tiny` wait than the reader may have under way. `quick` is on a healthy disk."""
    quick = write_model(store, "quick", neurons=NEURONS, bundle_bytes=BUNDLE_BYTES, seed=5)
    scattered = tuple(range(0, NEURONS, 2))
    for engine in ENGINES:
        with (
            serving(
                store, "--dram", "64MiB", "--cold-start", "--io-engine", engine, "--io-depth", "8", "--io-threads", "8"
            ) as daemon,
            source_of(daemon, "quick") as source,
            ThreadPoolExecutor() as threads,
        ):
            fetch(daemon, 0, 1)  # the resident weights of tiny are in memory
            disk.add(Rule(BUNDLES_FILE, "hold"))
            slow = threads.submit(fetch, daemon, 1, *scattered)
            for _ in range(8):
                disk.await_held()
            assert lease(source, 1, *range(0, 100, 3)) == bundles(quick, 1, *range(0, 100, 3))
            assert fetch(daemon, 0, *scattered, name="quick") == bundles(quick, 0, *scattered)
            assert not slow.done()
            disk.heal()
            assert slow.result(ANSWER_S) == bundles(model, 1, *scattered)


def test_a_client_of_a_slow_device_gets_one_clear_error_in_time(
    daemon: Daemon, disk: FailingDisk, model: TinyModel
) -> None:
    fetch(daemon, 0, 1)
    disk.add(cell(1, 9, "hold"))
    with pytest.raises(grpc.RpcError) as caught:
        fetch(daemon, 1, 9, timeout_s=1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    no_answer = pytest.raises(DaemonLostError, match=r"tiny: weightd did not answer within 1 s")
    with source_of(daemon, timeout_s=1) as source, no_answer:
        lease(source, 1, 9)
    disk.heal()
    with source_of(daemon) as source:
        assert lease(source, 1, 8, 9) == bundles(model, 1, 8, 9)
    while daemon.stub.Stats(pb.StatsRequest()).sessions > 0:
        pass  # the daemon may notice the end of a socket a moment later


# A file that is cut short


def test_a_bundles_file_cut_short_while_it_is_served(store: Path, model: TinyModel) -> None:
    path = store / "tiny" / BUNDLES_FILE
    whole = path.read_bytes()
    for engine in ENGINES:
        with (
            serving(store, "--dram", "64MiB", "--cold-start", "--io-engine", engine) as daemon,
            source_of(daemon) as source,
        ):
            os.truncate(path, (NEURONS + 9) * CELL_BYTES + 100)
            status, details = refusal(daemon, 1, 8, 9, 10)
            assert status is grpc.StatusCode.DATA_LOSS
            assert "model tiny, layer 1, neuron 9: the bundle" in details
            with pytest.raises(CorruptionError, match="tiny: layer 1, neuron at position 200 cannot be read"):
                lease(source, 1, 200)
            assert lease(source, 0, 8, 9) == bundles(model, 0, 8, 9)
            path.write_bytes(whole)
            assert lease(source, 1, 9, 200) == bundles(model, 1, 9, 200)


def test_a_bundles_file_cut_short_before_the_start_is_one_line(store: Path, model: TinyModel) -> None:
    os.truncate(store / "tiny" / BUNDLES_FILE, 5 * CELL_BYTES)
    status, log = refused(store, "--dram", "64MiB", "--listen", f"unix:{store}.sock")
    assert status == 1
    assert "bundles.bin: shorter than the catalog says" in log
    assert log.count("\n") == 1


def test_resident_weights_that_are_missing_are_named_with_the_remedy(store: Path, model: TinyModel) -> None:
    (store / "tiny" / RESIDENT_FILE).unlink()
    with serving(store, "--dram", "64MiB") as daemon:
        message = r"tiny/resident\.safetensors is missing: import or calibrate the model again"
        with pytest.raises(CorruptionError, match=message), source_of(daemon):
            pass


def test_a_damaged_model_keeps_none_of_the_others_from_being_served(store: Path, model: TinyModel) -> None:
    whole = write_model(store, "whole", seed=6)
    os.truncate(store / "tiny" / BUNDLES_FILE, 5 * CELL_BYTES)
    with serving(store, "--dram", "64MiB") as daemon:
        assert fetch(daemon, 1, 3, name="whole") == bundles(whole, 1, 3)
        status, details = refusal(daemon, 1, 3)
        assert status is grpc.StatusCode.FAILED_PRECONDITION
        assert "shorter than the catalog says" in details
    assert "shorter than the catalog says" in daemon.log


# Wrong bytes


def test_a_transfer_that_goes_wrong_is_not_noticed(daemon: Daemon, disk: FailingDisk, model: TinyModel) -> None:
    disk.add(cell(1, 5, "flip", times=1))
    assert fetch(daemon, 1, 5) == bundles(model, 1, 5)
    disk.add(Rule(RESIDENT_FILE, "flip", times=1))
    with source_of(daemon) as source:
        assert source.resident.tobytes()[:RESIDENT_BYTES] == model.resident


def test_wrong_bytes_that_stay_name_model_layer_and_neuron(
    daemon: Daemon, disk: FailingDisk, model: TinyModel, store: Path
) -> None:
    fetch(daemon, 0, 1)
    flip_bit(store / "tiny.behind" / BUNDLES_FILE, (NEURONS + 5) * CELL_BYTES + 17)
    status, details = refusal(daemon, 1, 4, 5, 6)
    assert status is grpc.StatusCode.DATA_LOSS
    assert "model tiny, layer 1, neuron 5: the bundle differs from its checksum" in details
    with source_of(daemon) as source:
        with pytest.raises(CorruptionError, match="tiny: layer 1, neuron at position 5 differs from its checksum"):
            lease(source, 1, 4, 5, 6)
        assert lease(source, 1, 4, 6) == bundles(model, 1, 4, 6)
