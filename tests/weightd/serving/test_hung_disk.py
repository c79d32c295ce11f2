"""A device that does not answer: calls that wait for it get an error in time, and no other call waits.

The disk of model `tiny` hangs: its file system delays reads, or the opening of files, until it is healed. Model `well`
is on another disk. Here weightd waits a second for a silent device instead of half a minute.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from daemon import Daemon, free_port, serving
from failing_disk import FailingDisk, Rule, failing_disk
from repository import FIXTURES
from tiny_store import TinyModel, write_model

from flashclient.daemon.channel import Connection
from weightd.serving.call_bounds import BOUNDS, FETCHES_MAX, OPENS_MAX
from weightd.store.store import RESIDENT_FILE
from weightd_proto import weightd_pb2 as pb
from weightd_proto.files import BUNDLES_FILE

NEURONS, BUNDLE_BYTES = 300, 4032
IMPATIENT = (sys.executable, str(FIXTURES / "impatient_weightd.py"))
ANSWER_S = 30  # much longer than any answer takes here; a test that waits so long has failed
CONFIG = "config.json"
FETCHES_OF_MODEL = BOUNDS["/weightd.v1.Weightd/Fetch"].of_model


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def tiny(store: Path) -> TinyModel:
    return write_model(store, neurons=NEURONS, bundle_bytes=BUNDLE_BYTES)


@pytest.fixture
def well(store: Path, tiny: TinyModel) -> TinyModel:
    return write_model(store, "well", neurons=NEURONS, bundle_bytes=BUNDLE_BYTES, seed=5)


@pytest.fixture
def disk(store: Path, well: TinyModel) -> Iterator[FailingDisk]:
    """The disk of `tiny`."""
    with failing_disk(store / "tiny") as mounted:
        yield mounted


@contextmanager
def impatient(store: Path, disk: FailingDisk, *flags: str) -> Iterator[Daemon]:
    with serving(store, "--dram", "64MiB", "--cold-start", *flags, prefix=IMPATIENT) as started:
        try:
            yield started
        finally:
            disk.heal()  # weightd cannot end while a read hangs


@pytest.fixture
def daemon(store: Path, disk: FailingDisk) -> Iterator[Daemon]:
    with impatient(store, disk) as started:
        yield started


def request(name: str, neuron: int = 7) -> pb.FetchRequest:
    return pb.FetchRequest(model=name, bundles=pb.NeuronSet(layer=1, neurons=[neuron]))


def fetch(stub: Any, wanted: pb.FetchRequest) -> bytes:
    return b"".join(part.data for part in stub.Fetch(wanted, timeout=ANSWER_S))


def refused(call: Any, *arguments: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)
    return caught.value.code(), caught.value.details() or ""


def assert_others_are_served(daemon: Daemon, well: TinyModel) -> None:
    """Makes all kinds of calls that do not concern `tiny`."""
    assert len(daemon.stub.Stats(pb.StatsRequest(), timeout=ANSWER_S).models) == 2
    assert list(daemon.stub.ListModels(pb.ListModelsRequest(), timeout=ANSWER_S).names) == ["tiny", "well"]
    assert daemon.stub.DescribeModel(pb.DescribeModelRequest(name="well"), timeout=ANSWER_S) == well.record
    assert fetch(daemon.stub, request("well")) == well.bundles[1][7].tobytes()
    assert daemon.stub.OpenSession(pb.OpenSessionRequest(model="well", slots_wanted=2), timeout=ANSWER_S).token


def test_a_fetch_of_a_hung_device_is_refused_in_time_and_the_next_is_served(
    daemon: Daemon, disk: FailingDisk, tiny: TinyModel, well: TinyModel
) -> None:
    fetch(daemon.stub, request("tiny", 1))  # from now on its resident weights are in memory
    disk.add(Rule(BUNDLES_FILE, "hold"))
    status, details = refused(fetch, daemon.stub, request("tiny"))
    assert status is grpc.StatusCode.INTERNAL
    assert details == "model tiny: the device has not answered for 1 s: check the device, then try again"
    assert_others_are_served(daemon, well)
    disk.heal()
    assert fetch(daemon.stub, request("tiny")) == tiny.bundles[1][7].tobytes()


def test_fetches_of_a_hung_device_are_bounded_also_when_their_callers_have_gone(
    store: Path, disk: FailingDisk, well: TinyModel
) -> None:
    """Waiting threads are counted, not calls: a cancelled call keeps its place until its file has been read."""
    port = free_port()
    with impatient(store, disk, "--listen", f"127.0.0.1:{port}") as daemon:
        disk.add(Rule(CONFIG, "hold"))
        another = Connection(f"127.0.0.1:{port}", timeout_s=ANSWER_S)  # over TCP, so another peer
        wanted = pb.FetchRequest(model="tiny", file=CONFIG)
        assert FETCHES_OF_MODEL is not None
        for stub, places in ((daemon.stub, FETCHES_MAX // 2), (another.stub, FETCHES_OF_MODEL - FETCHES_MAX // 2)):
            for _ in range(places):
                gone = stub.Fetch(wanted, timeout=ANSWER_S)
                disk.await_held()
                del gone  # cancels the call
        status, details = refused(fetch, another.stub, wanted)
        assert status is grpc.StatusCode.ABORTED
        assert f"{FETCHES_OF_MODEL} of {FETCHES_OF_MODEL} calls of Fetch run that want 'tiny'" in details
        assert fetch(another.stub, request("well")) == well.bundles[1][7].tobytes()
        assert len(daemon.stub.Stats(pb.StatsRequest(), timeout=ANSWER_S).models) == 2
        disk.heal()
        assert b"".join(another.fetch(wanted)).startswith(b"{")
        another.close()


def test_the_watchdog_is_fed_while_a_device_hangs(daemon: Daemon, disk: FailingDisk, well: TinyModel) -> None:
    """The watchdog does the same as Stats: it asks the engine's loop, which never waits for the device."""
    disk.add(Rule(RESIDENT_FILE, "hold"))
    with ThreadPoolExecutor() as threads:
        opening = threads.submit(daemon.stub.OpenSession, pb.OpenSessionRequest(model="tiny"), timeout=ANSWER_S)
        disk.await_held()
        for _ in range(100):
            daemon.stub.Stats(pb.StatsRequest(), timeout=ANSWER_S)
        assert not opening.done()
        disk.heal()
        assert opening.result(ANSWER_S).token


def test_sessions_of_a_model_whose_opening_hangs_are_refused_in_time(
    daemon: Daemon, disk: FailingDisk, well: TinyModel
) -> None:
    disk.add(Rule(RESIDENT_FILE, "hold"))
    wanted = pb.OpenSessionRequest(model="tiny", slots_wanted=2)
    with ThreadPoolExecutor(OPENS_MAX) as threads:
        first = threads.submit(daemon.stub.OpenSession, wanted, timeout=ANSWER_S)
        disk.await_held()
        others = [threads.submit(refused, daemon.stub.OpenSession, wanted) for _ in range(5)]
        assert_others_are_served(daemon, well)
        for other in others:
            status, details = other.result(ANSWER_S)
            assert status is grpc.StatusCode.INTERNAL
            assert "model tiny: the device has not answered for 1 s" in details
        assert not first.done()
        disk.heal()
        assert first.result(ANSWER_S).token
    assert daemon.stub.OpenSession(wanted, timeout=ANSWER_S).token


def test_opening_a_model_on_a_hung_disk_keeps_no_other_from_being_opened(store: Path, tmp_path: Path) -> None:
    """Both models are imported while the daemon runs, so they are opened when they are first requested."""
    first = write_model(store, "first", neurons=NEURONS, bundle_bytes=BUNDLE_BYTES)
    with serving(store, "--dram", "64MiB", "--cold-start", prefix=IMPATIENT) as daemon:
        tiny = write_model(store, "tiny", neurons=NEURONS, bundle_bytes=BUNDLE_BYTES, seed=3)
        late = write_model(store, "late", neurons=NEURONS, bundle_bytes=BUNDLE_BYTES, seed=4)
        with failing_disk(store / "tiny") as disk, ThreadPoolExecutor() as threads:
            disk.add(Rule(BUNDLES_FILE, "hold open"))
            describe = pb.DescribeModelRequest(name="tiny")
            waiting = [threads.submit(refused, daemon.stub.DescribeModel, describe) for _ in range(6)]
            disk.await_held()
            assert fetch(daemon.stub, request("first")) == first.bundles[1][7].tobytes()
            assert fetch(daemon.stub, request("late")) == late.bundles[1][7].tobytes()
            assert daemon.stub.Stats(pb.StatsRequest(), timeout=ANSWER_S).io_engine
            told: list[Future[tuple[grpc.StatusCode, str]]] = waiting
            for one in told:
                status, details = one.result(ANSWER_S)
                assert status is grpc.StatusCode.INTERNAL
                assert "model 'tiny' cannot be opened: the device has not answered for 1 s" in details
            disk.heal()
            assert daemon.stub.DescribeModel(describe, timeout=ANSWER_S) == tiny.record
            assert fetch(daemon.stub, request("tiny")) == tiny.bundles[1][7].tobytes()
            daemon.stop()


def test_a_hung_disk_at_the_start_keeps_only_its_model_from_being_served(
    store: Path, disk: FailingDisk, tiny: TinyModel, well: TinyModel
) -> None:
    disk.add(Rule(BUNDLES_FILE, "hold open"))
    with impatient(store, disk) as daemon:
        assert fetch(daemon.stub, request("well")) == well.bundles[1][7].tobytes()
        status, details = refused(fetch, daemon.stub, request("tiny"))
        assert status is grpc.StatusCode.INTERNAL
        assert "model 'tiny' cannot be opened" in details
        disk.heal()
        assert fetch(daemon.stub, request("tiny")) == tiny.bundles[1][7].tobytes()
    assert "model tiny is not served yet: its device has not answered for 1 s" in daemon.log
