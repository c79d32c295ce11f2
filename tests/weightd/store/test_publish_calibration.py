"""Publishing a calibration: all of it or nothing, served to sessions that open later, refused with the reason."""

from __future__ import annotations

import array
import json
import mmap
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from byte_flips import flip_bit
from daemon import Daemon, serving
from stored_calibration import contents, offline, record_of
from tiny_store import TinyModel, write_model

from flashclient.daemon.channel import Connection
from weightd import cli
from weightd.errors import CorruptionError, SpaceError, StoreError
from weightd.serving.served_models import demand_of
from weightd.store.calibration import CalibrationStaging, remove_old
from weightd.store.store import Store
from weightd.store.verify import verify_model
from weightd_proto import weightd_pb2 as pb
from weightd_proto.files import CALIBRATION_FILES

PIECE_BYTES = 100_000
# Hello and Welcome of proto/ring.h.
RING_MAGIC, RING_VERSION = 0x676E6972, 2
WELCOME = struct.Struct("<IIQQII")


def parts(name: str, record: pb.Calibration, data: bytes) -> Iterator[pb.PublishCalibrationRequest]:
    header = pb.PublishCalibrationHeader(model=name, calibration=record)
    yield pb.PublishCalibrationRequest(header=header)
    for first in range(0, len(data), PIECE_BYTES):
        yield pb.PublishCalibrationRequest(data=data[first : first + PIECE_BYTES])


def publish(daemon: Daemon, model: TinyModel, seed: int) -> pb.Calibration:
    files = contents(seed)
    answer = daemon.stub.PublishCalibration(parts("tiny", record_of(model.record, files), b"".join(files.values())))
    assert isinstance(answer, pb.Calibration)
    return answer


def fetch(daemon: Daemon, name: str, version: int = 0, byte_range: pb.ByteRange | None = None) -> bytes:
    wanted = pb.CalibrationFile(version=version, name=name, range=byte_range)
    return b"".join(part.data for part in daemon.stub.Fetch(pb.FetchRequest(model="tiny", calibration=wanted)))


def attach(daemon: Daemon, without_predictors: bool = False) -> tuple[socket.socket, bytes]:
    """A session made by hand: its socket, which keeps it alive, and the predictors that it got."""
    request = pb.OpenSessionRequest(model="tiny", slots_wanted=2, without_predictors=without_predictors)
    opened = daemon.stub.OpenSession(request)
    session = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    session.connect(opened.data_socket)
    session.send(struct.pack("<II", RING_MAGIC, RING_VERSION) + opened.token)
    welcome, ancillary, _, _ = session.recvmsg(WELCOME.size, socket.CMSG_SPACE(4 * 4))
    descriptors = array.array("i")
    descriptors.frombytes(ancillary[0][2])
    *_, size_bytes, _, error = WELCOME.unpack(welcome)
    assert error == 0
    data = b""
    if size_bytes:
        assert len(descriptors) == 4
        with mmap.mmap(descriptors[3], size_bytes, prot=mmap.PROT_READ) as mapped:
            data = mapped[:]
    for descriptor in descriptors:
        os.close(descriptor)
    return session, data


def stored_files(store: Path) -> list[str]:
    folder = store / "tiny" / "calibration"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def model(store: Path) -> TinyModel:
    return write_model(store)


@pytest.fixture
def daemon(store: Path, model: TinyModel) -> Iterator[Daemon]:
    with serving(store, "--dram", "64MiB") as started:
        yield started


def test_what_is_published_is_described_and_fetched(daemon: Daemon, model: TinyModel) -> None:
    published = publish(daemon, model, 1)
    assert published.version == 1
    assert published.published_unix_s > 0
    described = daemon.stub.DescribeModel(pb.DescribeModelRequest(name="tiny"))
    assert described.calibration == published
    assert (described.calibration.mode, described.name) == ("predict", "tiny")
    for name, data in contents(1).items():
        assert fetch(daemon, name) == data
        assert fetch(daemon, name, version=1) == data
    data = contents(1)["predictors.safetensors"]
    assert fetch(daemon, "predictors.safetensors", 1, pb.ByteRange(offset=77, size=200_000)) == data[77:200_077]


def test_the_default_cap_has_room_for_predictors(store: Path, model: TinyModel) -> None:
    with serving(store) as daemon:
        before, none = attach(daemon)
        whole = pb.FetchRequest(model="tiny", bundles=pb.NeuronSet(layer=0, positions=[pb.Range(begin=0, end=2)]))
        assert b"".join(part.data for part in daemon.stub.Fetch(whole))  # so there is a segment, which holds all of it
        publish(daemon, model, 1)
        after, predictors = attach(daemon)
        assert (none, predictors) == (b"", contents(1)["predictors.safetensors"])
        before.close()
        after.close()


def test_a_session_keeps_its_version_and_the_next_gets_the_new_one(daemon: Daemon, model: TinyModel) -> None:
    before, none = attach(daemon)
    publish(daemon, model, 1)
    old, first = attach(daemon)
    resident_bytes = daemon.stub.Stats(pb.StatsRequest()).dram_resident_bytes
    assert publish(daemon, model, 2).version == 2
    new, second = attach(daemon)
    assert none == b""
    assert first == contents(1)["predictors.safetensors"]
    assert second == contents(2)["predictors.safetensors"]
    predictors_bytes = -(-len(first) // 4096) * 4096
    assert daemon.stub.Stats(pb.StatsRequest()).dram_resident_bytes == resident_bytes + predictors_bytes
    old.close()
    while daemon.stub.Stats(pb.StatsRequest()).sessions > 2:
        pass  # the daemon may notice the end of a socket a moment later
    assert daemon.stub.Stats(pb.StatsRequest()).dram_resident_bytes == resident_bytes
    for session in (before, new):
        session.close()


def test_a_session_without_predictors_leaves_their_memory_to_the_pool(daemon: Daemon, model: TinyModel) -> None:
    publish(daemon, model, 1)
    session, predictors = attach(daemon, without_predictors=True)
    resident_bytes = daemon.stub.Stats(pb.StatsRequest()).dram_resident_bytes
    predicting, first = attach(daemon)
    assert (predictors, first) == (b"", contents(1)["predictors.safetensors"])
    predictors_bytes = -(-len(first) // 4096) * 4096
    assert daemon.stub.Stats(pb.StatsRequest()).dram_resident_bytes == resident_bytes + predictors_bytes
    session.close()
    predicting.close()


def test_only_the_newest_stays_on_flash(daemon: Daemon, model: TinyModel, store: Path) -> None:
    for seed in range(3):
        publish(daemon, model, seed)
    assert stored_files(store) == sorted(f"3/{name}" for name in CALIBRATION_FILES)
    assert not [path.name for path in store.iterdir() if path.name.startswith((".import", ".removed"))]
    with pytest.raises(grpc.RpcError) as caught:
        fetch(daemon, "report.json", version=2)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no version 2" in (caught.value.details() or "")


def test_a_calibration_outlives_the_daemon(daemon: Daemon, model: TinyModel, store: Path) -> None:
    publish(daemon, model, 5)
    daemon.stop()
    with serving(store, "--dram", "64MiB") as again:
        session, predictors = attach(again)
        assert predictors == contents(5)["predictors.safetensors"]
        assert fetch(again, "report.json") == contents(5)["report.json"]
        session.close()


def refused(daemon: Daemon, requests: Iterator[pb.PublishCalibrationRequest]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        daemon.stub.PublishCalibration(requests)
    return caught.value.code(), caught.value.details() or ""


GOOD = contents(3)
GOOD_DATA = b"".join(GOOD.values())
WITHOUT_REPORT = {name: data for name, data in GOOD.items() if name != "report.json"}


@pytest.mark.parametrize(
    ("changes", "data", "status", "words"),
    [
        ({"import_id": b"x" * 16}, GOOD_DATA, grpc.StatusCode.FAILED_PRECONDITION, "another import"),
        ({"mode": "fast"}, GOOD_DATA, grpc.StatusCode.INVALID_ARGUMENT, "'fast'"),
        ({"lossy_mode": "fast"}, GOOD_DATA, grpc.StatusCode.INVALID_ARGUMENT, "mode 'fast'"),
        ({"lossy_mode": "threshold"}, GOOD_DATA, grpc.StatusCode.INVALID_ARGUMENT, "as the default"),
        ({"files": []}, b"", grpc.StatusCode.INVALID_ARGUMENT, "want predictors"),
        (
            {"files": [pb.File(name="../../catalog.mdb", size_bytes=1)] * 3},
            b"abc",
            grpc.StatusCode.INVALID_ARGUMENT,
            "catalog.mdb",
        ),
        (
            {"files": [pb.File(name=name, size_bytes=20 << (i * 20)) for i, name in enumerate(CALIBRATION_FILES)]},
            b"abc",
            grpc.StatusCode.INVALID_ARGUMENT,
            "TiB",
        ),
        ({"files": [pb.File(name=name) for name in CALIBRATION_FILES]}, b"", grpc.StatusCode.INVALID_ARGUMENT, "empty"),
        ({}, GOOD_DATA[:-1], grpc.StatusCode.INVALID_ARGUMENT, "ended early, in report.json"),
        ({}, GOOD_DATA + b"x", grpc.StatusCode.INVALID_ARGUMENT, "1 bytes beyond"),
        ({}, b"x" + GOOD_DATA[1:], grpc.StatusCode.DATA_LOSS, "predictors.safetensors"),
    ],
)
def test_what_is_refused_leaves_nothing(
    daemon: Daemon,
    model: TinyModel,
    store: Path,
    changes: dict[str, Any],
    data: bytes,
    status: grpc.StatusCode,
    words: str,
) -> None:
    publish(daemon, model, 1)
    before = stored_files(store)
    code, details = refused(daemon, parts("tiny", record_of(model.record, GOOD, **changes), data))
    assert code is status, details
    assert words in details
    assert stored_files(store) == before
    assert not [path.name for path in store.iterdir() if path.name.startswith(".import")]
    assert fetch(daemon, "report.json") == contents(1)["report.json"]


def test_a_model_that_is_imported_again_meanwhile_gets_no_old_calibration(store: Path, model: TinyModel) -> None:
    record = record_of(model.record, GOOD)
    with Store.open(store) as opened, CalibrationStaging(opened, model.record, record) as staging:
        staging.write(GOOD_DATA)
        write_model(store, seed=1, replaces=model.record.import_id)
        with pytest.raises(StoreError, match="a calibration of another import of 'tiny'"):
            staging.publish()
        assert not opened.model("tiny").HasField("calibration")


def test_a_daemon_refuses_a_calibration_of_a_model_that_was_replaced(
    daemon: Daemon, model: TinyModel, store: Path
) -> None:
    def replaced_at_the_end() -> Iterator[pb.PublishCalibrationRequest]:
        yield from parts("tiny", record_of(model.record, GOOD), GOOD_DATA)
        write_model(store, seed=1, replaces=model.record.import_id)
        connection = Connection(daemon.address, 20.0)
        connection.remove("tiny", replaced=True)
        connection.close()

    code, details = refused(daemon, replaced_at_the_end())
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "'tiny' was removed or imported again meanwhile" in details
    assert not daemon.stub.DescribeModel(pb.DescribeModelRequest(name="tiny")).HasField("calibration")


def test_a_calibration_is_not_lost_to_an_import_that_began_before(store: Path, model: TinyModel) -> None:
    with Store.open(store) as opened, opened.begin_import("tiny", model.record.import_id) as staging:
        published = offline(store, model.record)
        sums = [opened.checksums("tiny", layer) for layer in range(len(model.record.layers))]
        with pytest.raises(StoreError, match=r"was calibrated meanwhile.*use the old import, remove it with"):
            staging.publish(model.record, sums)
        assert opened.model("tiny").calibration == published


def test_parts_out_of_order_are_refused(daemon: Daemon, model: TinyModel) -> None:
    record = record_of(model.record, GOOD)
    header = next(parts("tiny", record, b""))
    data = pb.PublishCalibrationRequest(data=b"abc")
    large = pb.PublishCalibrationRequest(data=bytes((1 << 20) + 1))
    for requests, words in (
        ([data], "begins with its header"),
        ([], "begins with its header"),
        ([header, header], "one header"),
        ([header, large], "at most 1048576"),
    ):
        code, details = refused(daemon, iter(requests))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert words in details
    assert refused(daemon, parts("nope", record, b""))[0] is grpc.StatusCode.NOT_FOUND


def test_a_client_that_goes_away_leaves_nothing(daemon: Daemon, model: TinyModel, store: Path) -> None:
    def first_half() -> Iterator[pb.PublishCalibrationRequest]:
        yield from parts("tiny", record_of(model.record, GOOD), GOOD_DATA[: len(GOOD_DATA) // 2])
        while not [path for path in store.iterdir() if path.name.startswith(".import")]:
            pass
        assert named.wait(60)
        call.cancel()

    named = Event()  # gRPC asks for requests before `call` has a value
    call = daemon.stub.PublishCalibration.future(first_half())
    named.set()
    with pytest.raises(grpc.FutureCancelledError):
        call.result()
    while [path for path in store.iterdir() if path.name.startswith((".import", ".removed"))]:
        pass
    assert stored_files(store) == []


def test_tcp_peers_may_not_publish(store: Path, model: TinyModel) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serving(store, "--dram", "64MiB", address=f"127.0.0.1:{port}") as daemon:
        code, details = refused(daemon, parts("tiny", record_of(model.record, GOOD), GOOD_DATA))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "Unix socket" in details


def test_predictors_that_do_not_fit_into_dram_are_refused_with_the_numbers(store: Path, model: TinyModel) -> None:
    smallest_bytes = demand_of(model.record).minimum_bytes
    with serving(store, "--dram", str(smallest_bytes + 100_000)) as daemon:
        code, details = refused(daemon, parts("tiny", record_of(model.record, GOOD), GOOD_DATA))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "--dram" in details
        assert any(character.isdigit() for character in details)
        attach(daemon)[0].close()


def test_what_was_never_calibrated_says_how(daemon: Daemon) -> None:
    with pytest.raises(grpc.RpcError, match="flashclient calibrate tiny"):
        fetch(daemon, "report.json")


def test_corrupt_predictors_are_data_loss(store: Path, model: TinyModel) -> None:
    offline(store, model.record)
    flip_bit(store / "tiny/calibration/1/predictors.safetensors", 4711)
    with Store.open(store) as opened, pytest.raises(CorruptionError, match=r"tiny.*predictors\.safetensors"):
        verify_model(opened, "tiny")
    with serving(store, "--dram", "64MiB") as daemon:
        for call in (lambda: attach(daemon), lambda: fetch(daemon, "predictors.safetensors")):
            with pytest.raises(grpc.RpcError, match=r"predictors\.safetensors") as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.DATA_LOSS


def test_verify_counts_the_files_and_finds_a_missing_one(store: Path, model: TinyModel) -> None:
    with Store.open(store) as opened:
        files = verify_model(opened, "tiny").files
        offline(store, model.record)
        assert verify_model(opened, "tiny").files == files + 3
        (store / "tiny/calibration/1/statistics.safetensors").unlink()
        with pytest.raises(CorruptionError, match=r"statistics\.safetensors is missing"):
            verify_model(opened, "tiny")


def test_ls_shows_it_and_rm_removes_it(store: Path, model: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls", "--store", str(store)]) == 0
    assert "not calibrated" in capsys.readouterr().out
    offline(store, model.record)
    offline(store, model.record, 2)
    assert cli.main(["ls", "--store", str(store)]) == 0
    assert "calibrated 2, mode predict" in capsys.readouterr().out
    assert cli.main(["ls", "--json", "--store", str(store)]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["calibration"]["mode"] == "predict"
    assert cli.main(["rm", "tiny", "--store", str(store)]) == 0
    assert not (store / "tiny").exists()
    write_model(store)
    with Store.open(store) as opened:
        assert not opened.model("tiny").HasField("calibration")


def test_what_a_killed_publishing_left_behind_goes(store: Path, model: TinyModel) -> None:
    offline(store, model.record)
    orphan = store / "tiny/calibration/2"
    orphan.mkdir()
    (orphan / "report.json").write_text("half of one")
    assert offline(store, model.record, 2).version == 2
    assert (orphan / "report.json").read_bytes() == contents(2)["report.json"]
    with Store.open(store) as opened:
        remove_old(opened, opened.model("tiny"))
    assert stored_files(store) == sorted(f"2/{name}" for name in CALIBRATION_FILES)


def test_a_full_device_is_said_with_the_numbers(store: Path, model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SpaceError, match="1000"):
        offline(store, model.record)
    assert not (store / "tiny/calibration").exists()
