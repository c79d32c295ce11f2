"""One named test per fault of a publishing: kills at every point, and a disk that fills up."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from daemon import serving
from repository import FIXTURES
from small_disk import fill, small_disk
from stored_calibration import contents, offline, record_of
from tiny_store import TinyModel, write_model

from weightd.store.store import Store
from weightd.store.verify import verify_model
from weightd_proto import weightd_pb2 as pb
from weightd_proto.files import CALIBRATION_FILES

DYING = FIXTURES / "dying_process.py"
POINTS = {  # and the version that is there afterwards
    "after mkdir .import-*": 1,
    "before fsync predictors.safetensors": 1,
    "after fsync report.json": 1,
    "before rename .import-*": 1,
    "after rename .import-*": 1,
    "after fsync calibration": 1,
    "fdatasync": 1,
    "write of the meta page": 1,
    "before unlink .unpublished": 2,
    "after unlink .unpublished": 2,
}


def assert_calibrated(store: Path, version: int) -> None:
    """Asserts that the store is whole, has exactly this calibration, and no leftovers."""
    with Store.open(store) as opened:
        assert opened.model("tiny").calibration.version == version
        verify_model(opened, "tiny")
    assert not [path.name for path in store.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_publishing_leaves_the_old_calibration_or_the_new_one(tmp_path: Path, point: str) -> None:
    store = tmp_path / "store"
    model = write_model(store).record
    offline(store, model)
    command = [sys.executable, str(DYING), point, "publish", str(store), "tiny"]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode in (-signal.SIGKILL, -signal.SIGSYS), killed.stderr
    assert_calibrated(store, POINTS[point])
    assert offline(store, model, 3).version == POINTS[point] + 1
    assert_calibrated(store, POINTS[point] + 1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path, 60_000_000) as mounted:
        yield mounted


def sent(model: TinyModel, meanwhile: Path | None) -> Iterator[pb.PublishCalibrationRequest]:
    """The messages of a calibration. Before the data is sent, the disk `meanwhile` is filled."""
    files = contents(2)
    header = pb.PublishCalibrationHeader(model="tiny", calibration=record_of(model.record, files))
    yield pb.PublishCalibrationRequest(header=header)
    if meanwhile is not None:
        while not [path for path in (meanwhile / "store").iterdir() if path.name.startswith(".import")]:
            pass
        fill(meanwhile)
    yield pb.PublishCalibrationRequest(data=b"".join(files.values()))


def test_a_disk_that_fills_up_during_a_publishing_leaves_the_old_calibration(disk: Path) -> None:
    model = write_model(disk / "store")
    offline(disk / "store", model.record)
    with serving(disk / "store", "--dram", "64MiB", address=f"unix:{disk.parent}/sock") as daemon:
        with pytest.raises(grpc.RpcError, match="no space in") as caught:
            daemon.stub.PublishCalibration(sent(model, disk))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        (disk / "ballast").unlink()
        wanted = pb.FetchRequest(model="tiny", calibration=pb.CalibrationFile(name=CALIBRATION_FILES[0]))
        assert b"".join(part.data for part in daemon.stub.Fetch(wanted)) == contents(1)[CALIBRATION_FILES[0]]
        assert daemon.stub.PublishCalibration(sent(model, None)).version == 2
    assert_calibrated(disk / "store", 2)
