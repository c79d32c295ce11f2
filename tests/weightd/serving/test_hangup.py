"""SIGHUP: a closing terminal ends weightd, but not one that nohup started or that has no terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from daemon import command
from tiny_store import write_model

from weightd_proto import weightd_pb2 as pb
from weightd_proto import weightd_pb2_grpc


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_model(tmp_path / "store")
    return tmp_path / "store"


@contextmanager
def in_a_terminal(store: Path, ignored: bool = False) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """weightd as the leader of a session with a terminal, and the other end of the terminal."""
    outside, inside = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(inside, termios.TIOCSCTTY, 0)
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    started = [*command(store), "--listen", f"unix:{store}.sock", "--dram", "64MiB"]
    process = subprocess.Popen(
        started, stdin=inside, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=take_terminal
    )
    os.close(inside)
    assert process.stderr is not None
    try:
        while "serving" not in process.stderr.readline():
            assert process.poll() is None
        yield process, outside
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()


def test_a_closing_terminal_ends_it_cleanly(store: Path) -> None:
    with in_a_terminal(store) as (process, outside):
        os.close(outside)
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == "weightd: stopping\n"
    assert [path.name for path in store.parent.iterdir()] == ["store"]


def test_the_same_signal_reads_the_configuration_where_the_terminal_is_there(store: Path) -> None:
    with in_a_terminal(store) as (process, outside):
        process.send_signal(signal.SIGHUP)
        assert process.stderr is not None
        assert "read again" in process.stderr.readline()
        os.close(outside)
        assert process.wait(30) == 0


def test_nohup_keeps_it_alive(store: Path) -> None:
    with in_a_terminal(store, ignored=True) as (process, outside):
        os.close(outside)
        assert process.stderr is not None
        assert "read again" in process.stderr.readline()
        with grpc.insecure_channel(f"unix:{store}.sock") as channel:
            stub = weightd_pb2_grpc.WeightdStub(channel)  # type: ignore[no-untyped-call]
            assert list(stub.ListModels(pb.ListModelsRequest(), timeout=20).names) == ["tiny"]
        assert process.poll() is None
