"""Start, refusal and end of the daemon's process."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from daemon import MEMLOCK_OF_A_USER, free_port, refused, serving
from repository import FIXTURES
from tiny_store import write_model

from weightd.store.store import Store
from weightd_proto import weightd_pb2 as pb


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_model(tmp_path / "store")
    return tmp_path / "store"


def leftovers(store: Path) -> list[str]:
    return [path.name for path in store.parent.iterdir() if path != store]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_leaves_nothing(store: Path, number: signal.Signals) -> None:
    with serving(store, "--dram", "64MiB") as daemon:
        assert "store.sock" in leftovers(store)
        daemon.process.send_signal(number)
        status, log = daemon.wait()
    assert status == 0
    assert leftovers(store) == []
    assert Store.open(store).served_by() is None
    serving_lines = [line for line in log.splitlines() if "serving" in line]
    assert len(serving_lines) == 1
    assert all(word in serving_lines[0] for word in (str(store), "tiny", "64MiB", "unix:"))
    assert "Traceback" not in log


def test_the_end_of_its_owner_ends_it(store: Path) -> None:
    with serving(store, "--dram", "64MiB") as daemon:
        os.close(daemon.owner_fd)
        status, _ = daemon.wait()
        daemon.owner_fd = os.open(os.devnull, os.O_RDONLY)
    assert status == 0
    assert leftovers(store) == []


def test_a_second_daemon_on_the_store_is_refused(store: Path) -> None:
    with serving(store, "--dram", "64MiB") as daemon:
        status, message = refused(store, "--listen", f"unix:{store}.other", "--dram", "64MiB")
        assert status == 1
        assert str(daemon.process.pid) in message
        assert message.count("\n") == 1
        daemon.stub.ListModels(pb.ListModelsRequest())


def test_a_socket_in_use_is_refused_and_left_alone(store: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "other")
    with serving(store, "--dram", "64MiB") as daemon:
        status, message = refused(tmp_path / "other", "--listen", daemon.address, "--dram", "64MiB")
        assert status == 2
        assert "another process listens" in message
        daemon.stub.ListModels(pb.ListModelsRequest())


def test_a_stale_socket_is_replaced(store: Path) -> None:
    for name, kind in (("store.sock", socket.SOCK_STREAM), ("store.sock.data", socket.SOCK_SEQPACKET)):
        with socket.socket(socket.AF_UNIX, kind) as dead:
            dead.bind(str(store.parent / name))
    with serving(store, "--dram", "64MiB") as daemon:
        assert list(daemon.stub.ListModels(pb.ListModelsRequest()).names) == ["tiny"]


def test_a_killed_daemon_can_be_started_again(store: Path) -> None:
    with serving(store, "--dram", "64MiB") as daemon:
        daemon.process.kill()
        daemon.wait()
    with serving(store, "--dram", "64MiB") as daemon:
        assert list(daemon.stub.ListModels(pb.ListModelsRequest()).names) == ["tiny"]


def test_loopback_tcp_alone(store: Path) -> None:
    with serving(store, "--dram", "64MiB", address=f"127.0.0.1:{free_port()}") as daemon:
        opened = daemon.stub.OpenSession(pb.OpenSessionRequest(model="tiny"))
        folder = Path(opened.data_socket).parent
        assert folder.stat().st_mode & 0o077 == 0
        assert daemon.stop()[0] == 0
    assert not folder.exists()


def test_the_default_dram_is_printed(store: Path) -> None:
    with serving(store) as daemon:
        assert daemon.stub.Stats(pb.StatsRequest()).dram_limit_bytes > 0
        _, log = daemon.stop()
    assert "--dram" in log


@pytest.mark.parametrize("engine", ["threads", "io_uring"])
def test_the_io_engine_is_the_one_asked_for(store: Path, engine: str) -> None:
    with serving(store, "--dram", "64MiB", "--io-engine", engine) as daemon:
        assert engine.removesuffix("s") in daemon.stub.Stats(pb.StatsRequest()).io_engine


WITHOUT_IO_URING = (sys.executable, str(FIXTURES / "without_io_uring.py"))


def test_threads_read_where_io_uring_is_refused_and_the_log_says_so_once(store: Path) -> None:
    with serving(store, "--dram", "64MiB", prefix=WITHOUT_IO_URING) as daemon:
        assert "threads" in daemon.stub.Stats(pb.StatsRequest()).io_engine
        _, log = daemon.stop()
    assert log.count("io_uring") == 1, log


def test_io_uring_asked_for_and_refused_is_one_line(store: Path) -> None:
    status, message = refused(store, "--dram", "64MiB", "--io-engine", "io_uring", prefix=WITHOUT_IO_URING)
    assert (status, message.count("\n")) == (1, 1), message
    assert "io_uring" in message


def test_buffers_stay_unregistered_under_the_memlock_limit_of_a_user(store: Path) -> None:
    with serving(store, "--dram", "64MiB", prefix=MEMLOCK_OF_A_USER) as daemon:
        assert "not registered" in daemon.stub.Stats(pb.StatsRequest()).io_engine
        _, log = daemon.stop()
    assert log.count("memlock") == 1, log


@pytest.fixture
def store_without_direct_io(tmp_path: Path) -> Iterator[Path]:
    """The store is on ramfs, which has no direct I/O."""
    folder = tmp_path / "ramfs"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "ramfs", "ramfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"nothing may be mounted here: {mounted.stderr.decode().strip()}")
    try:
        write_model(folder / "store")
        yield folder / "store"
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # io_uring closes files a moment later


def test_a_file_system_without_direct_io_is_refused(store_without_direct_io: Path, tmp_path: Path) -> None:
    listen = ("--listen", f"unix:{tmp_path}/w.sock", "--dram", "64MiB")
    status, message = refused(store_without_direct_io, *listen)
    assert (status, message.count("\n")) == (1, 1), message
    assert "O_DIRECT" in message
    assert "--allow-buffered" in message
    with serving(store_without_direct_io, "--allow-buffered", "--dram", "64MiB", address=listen[1]) as daemon:
        request = pb.FetchRequest(model="tiny", bundles=pb.NeuronSet(layer=1, neurons=[100, 3]))
        assert sum(len(response.data) for response in daemon.stub.Fetch(request)) == 2 * 96
        _, log = daemon.stop()
    assert "page cache" in log


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--dram", "64KiB"], 1, ["64KiB", "too small", "tiny needs at least"]),
        (["--dram", "900TiB"], 1, ["900TiB", "at most --dram"]),
        (["--drm", "1GiB"], 2, ["--drm", "--dram"]),
        (["--listen", "0.0.0.0:7070"], 2, ["TLS"]),
        (["--listen", "unix:/no/such/folder/w.sock"], 2, ["/no/such/folder"]),
        (["--owner-fd", "77"], 2, ["--owner-fd 77"]),
    ],
)
def test_bad_input_is_one_line(store: Path, flags: list[str], status: int, words: list[str]) -> None:
    if "--listen" not in flags:
        flags = [*flags, "--listen", f"unix:{store}.sock"]
    done, message = refused(store, *flags)
    assert (done, message.count("\n")) == (status, 1), message
    assert all(word in message for word in words), message
    assert leftovers(store) == []


def test_no_store_is_one_line(tmp_path: Path) -> None:
    status, message = refused(tmp_path / "none", "--listen", f"unix:{tmp_path}/w.sock")
    assert (status, message.count("\n")) == (1, 1)
    assert "none" in message


def test_a_missing_bundles_file_is_one_line(store: Path) -> None:
    (store / "tiny" / "bundles.bin").unlink()
    status, message = refused(store, "--listen", f"unix:{store}.sock", "--dram", "64MiB")
    assert (status, message.count("\n")) == (1, 1)
    assert "bundles.bin" in message


def test_calls_after_the_end_fail_at_once(store: Path) -> None:
    with serving(store, "--dram", "64MiB") as daemon:
        daemon.stop()
        with pytest.raises(grpc.RpcError) as caught:
            daemon.stub.ListModels(pb.ListModelsRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_many_sessions_take_all_descriptors_and_nothing_else(store: Path) -> None:
    with serving(store, "--dram", "64MiB", prefix=("prlimit", "--nofile=64:128", "--")) as daemon:
        limits = Path(f"/proc/{daemon.process.pid}/limits").read_text()
        assert re.search(r"Max open files +128 +128 ", limits), "the soft limit is raised"
        refusals = []
        for _ in range(100):
            try:
                daemon.stub.OpenSession(pb.OpenSessionRequest(model="tiny", slots_wanted=2))
            except grpc.RpcError as error:
                refusals.append((error.code(), "descriptor" in (error.details() or "")))
        assert set(refusals) == {(grpc.StatusCode.RESOURCE_EXHAUSTED, True)}
        bundles = pb.NeuronSet(layer=0, neurons=[1])
        with suppress(grpc.RpcError):  # waits for a session to expire, or for ever: there was no segment before
            list(daemon.stub.Fetch(pb.FetchRequest(model="tiny", bundles=bundles), timeout=1))
        assert daemon.stub.Stats(pb.StatsRequest()).sessions > 0
