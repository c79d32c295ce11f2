"""Messages to systemd: ready, reloading, stopping, and a watchdog that is fed only while the engine's loop runs."""

from __future__ import annotations

import ctypes
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemon import Daemon, serving
from tiny_store import write_model

WATCHDOG_S = 0.6
UNREAD_MESSAGES_MAX = 30  # messages that may have arrived while a busy machine did not run this test
PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH = 0x4206, 0x4207, 17


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket of a service manager, named in the environment of processes that are started next."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", str(int(WATCHDOG_S * 1e6)))
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(60)
        yield listener


@contextmanager
def daemon_in(folder: Path) -> Iterator[Daemon]:
    write_model(folder / "store")
    with serving(folder / "store", "--dram", "64MiB") as daemon:
        yield daemon


def heard(manager: socket.socket, line: str) -> bool:
    """Whether `line` is among the next messages, before the timeout."""
    try:
        while line not in manager.recv(4096).decode().splitlines():
            pass
    except TimeoutError:
        return False
    return True


def falls_silent(manager: socket.socket, line: str) -> bool:
    """Whether `line` is not sent any more, once the messages that were already sent have been read."""
    return any(not heard(manager, line) for _ in range(UNREAD_MESSAGES_MAX))


def test_ready_reloading_and_stopping_are_said(manager: socket.socket, tmp_path: Path) -> None:
    with daemon_in(tmp_path) as daemon:
        assert heard(manager, "READY=1")
        daemon.process.send_signal(signal.SIGHUP)
        assert heard(manager, "RELOADING=1")
        assert heard(manager, "READY=1")
        daemon.process.send_signal(signal.SIGTERM)
        assert heard(manager, "STOPPING=1")


def test_the_watchdog_is_fed_only_while_the_engine_moves(manager: socket.socket, tmp_path: Path) -> None:
    with daemon_in(tmp_path) as daemon:
        assert heard(manager, "WATCHDOG=1")
        assert heard(manager, "WATCHDOG=1")
        with stopped_thread(daemon.process.pid, "weightd-engine"):
            manager.settimeout(3 * WATCHDOG_S)
            assert falls_silent(manager, "WATCHDOG=1")
        manager.settimeout(60)
        assert heard(manager, "WATCHDOG=1")


@contextmanager
def stopped_thread(pid: int, name: str) -> Iterator[None]:
    """Stops only this thread of the process, as if it hung."""
    comms = Path(f"/proc/{pid}/task").glob("*/comm")
    (thread,) = [int(comm.parent.name) for comm in comms if comm.read_text().strip() == name]
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    if ptrace(PTRACE_SEIZE, thread, None, None) != 0:
        pytest.skip("no process may be traced here")
    assert ptrace(PTRACE_INTERRUPT, thread, None, None) == 0
    _await_stop(thread)
    try:
        yield
    finally:
        assert ptrace(PTRACE_DETACH, thread, None, None) == 0


def _await_stop(thread: int) -> None:
    status = ctypes.c_int()
    wall = 0x40000000  # __WALL: waits for threads, too
    assert ctypes.CDLL(None).waitpid(thread, ctypes.byref(status), wall) == thread
