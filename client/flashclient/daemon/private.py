"""The weightd of a store: the one that serves it already, or a private child of this process.

STORE/weightd.lock names the daemon that serves the store, {"pid": ..., "address": ...}; the daemon holds it locked. The
client asks that address. It does not try the lock, which could disturb a daemon that is about to take it. If several
processes start a daemon at the same time, the daemon that gets the lock serves, and all of them attach to it.

A private daemon ends with the last process that uses it. In the folder of its socket is a FIFO, and the daemon serves
as long as some process has the FIFO open for writing. Only one user may open the folder.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import stat
import subprocess
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flashclient.daemon.address import NO_TLS, parse_address
from flashclient.daemon.channel import Connection, open_channel
from flashclient.daemon.weightd_command import WEIGHTD, environment, last_words
from flashclient.errors import OptionError, StartError
from weightd_proto.addresses import SOCKET_FILE, unfit_for_a_socket
from weightd_proto.files import BUNDLES_FILE, DAEMON_LOCK_FILE

LOCK_BYTES_MAX = 4096
USERS_FILE = "users"  # the FIFO
POLL_S = 0.02
LET_GO_MS = 200  # time for a child that was just forked to close its copy of the FIFO
HEALTH_S = 2.0  # for one answer of a busy daemon
STOP_S = 10.0  # a daemon finishes its reads and closes its sessions before it ends


@contextmanager
def started_ahead(store: Path, dram: str | int | None) -> Iterator[None]:
    """Starts a private weightd without waiting for it; within the context, attach_or_start() takes it.

    A process can do other work while the daemon starts, such as importing torch. Nothing is started for a store that
    holds no model or that a live process claims. Raises StartError as PrivateDaemon.start() does.
    """
    store = store.resolve()
    if any(store.glob(f"*/{BUNDLES_FILE}")) and not _rival(store):
        _ahead[store] = PrivateDaemon.start(store, dram)
    try:
        yield
    finally:
        if (unused := _ahead.pop(store, None)) is not None:
            unused.stop()


def attach_or_start(store: Path, dram: str | int | None, timeout_s: float) -> tuple[str, PrivateDaemon | None]:
    """The address of the weightd that serves `store`, and the daemon to stop later if it is a private one.

    Raises:
        StartError: it could not be started; repeats its message.
    """
    deadline = time.monotonic() + timeout_s
    found = None if store in _ahead else _attach(store)
    while found is None:
        daemon = _ahead.pop(store, None) or PrivateDaemon.start(store, dram)
        was_rival = _await_serving(daemon, store, deadline)
        if not daemon.has_ended():
            return daemon.address, daemon
        said = daemon.last_words()
        daemon.stop()
        if not was_rival:  # it did not end because another daemon serves the store
            raise StartError(f"cannot start weightd for {store}: {said}")
        while (found := _attach(store)) is None and _rival(store) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if found is None and time.monotonic() > deadline:
            raise StartError(f"cannot start weightd for {store}: {said}")
    _warn_of_unused_dram(found[0], dram, timeout_s)
    return found


def _await_serving(daemon: PrivateDaemon, store: Path, deadline: float) -> bool:
    """Waits until `daemon` serves or has ended. Returns whether another daemon was seen at the store.

    Raises StartError after `deadline`.
    """
    was_rival = False
    while not daemon.has_ended() and not is_serving(daemon.address):
        was_rival = was_rival or _rival(store, daemon.pid)
        if time.monotonic() > deadline:
            daemon.stop()
            raise StartError(f"weightd for {store} was not ready in time: raise timeout_s=")
        time.sleep(POLL_S)
    return was_rival or _rival(store, daemon.pid)


def _warn_of_unused_dram(address: str, dram: str | int | None, timeout_s: float) -> None:
    """Warns that `dram` has no effect, because the daemon was started with another --dram."""
    if dram is None:
        return
    connection = Connection(address, timeout_s)
    limit_bytes = connection.stats().dram_limit_bytes
    connection.close()
    warnings.warn(
        f"dram={dram!r} has no effect: a weightd at {address} serves the store already, with --dram "
        f"{limit_bytes / 2**20:.1f}MiB; stop it, or leave dram= out",
        stacklevel=2,
    )


def _lock(store: Path) -> dict[str, Any]:
    """The content of the lock file; empty if there is none, it is being written, or it is damaged."""
    try:
        with (store / DAEMON_LOCK_FILE).open("rb") as file:
            content = json.loads(file.read(LOCK_BYTES_MAX))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _rival(store: Path, own_pid: int | None = None) -> bool:
    """Whether a live process other than `own_pid` claims the store. A lock file may outlive its process."""
    pid = _lock(store).get("pid")
    return isinstance(pid, int) and pid != own_pid and _lives(pid)


def _lives(pid: int) -> bool:
    """Whether the process runs. A zombie, which has ended and whose parent has not waited for it, does not."""
    try:
        process = os.pidfd_open(pid)
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    except OSError:  # the kernel or a seccomp filter refuses pidfds; or `pid` cannot be a process
        return Path(f"/proc/{pid}").exists()
    try:
        return not select.select([process], [], [], 0)[0]
    finally:
        os.close(process)


def _attach(store: Path) -> tuple[str, PrivateDaemon | None] | None:
    """The address of the daemon that serves `store`, and the daemon, held from now on, if it is a private one.

    None if none serves yet.
    """
    lock = _lock(store)
    address, pid = lock.get("address"), lock.get("pid")
    if not isinstance(address, str) or not isinstance(pid, int) or not _lives(pid):
        return None
    address = os.fsdecode(address.encode(errors="surrogateescape"))
    try:
        daemon = PrivateDaemon.join(address, pid)
    except BrokenPipeError:  # it is about to end
        return None
    if is_serving(address):
        return address, daemon
    if daemon is not None:
        daemon.let_go()
    return None


def is_serving(address: str) -> bool:
    """Whether a weightd at `address` answers that it serves."""
    try:
        parsed = parse_address(address)
    except OptionError:
        return False
    # A new channel each time, because a channel that failed to connect waits a second before it tries again.
    with open_channel(parsed, NO_TLS, ("grpc.use_local_subchannel_pool", 1)) as channel, suppress(grpc.RpcError):
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_S)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
    return False


class PrivateDaemon:
    """A weightd that ends with the last of its users. Each user holds open the FIFO that the daemon reads."""

    def __init__(self, folder: Path) -> None:
        """Use `start` or `join`. `folder` holds the socket, is this user's alone and is removed after the daemon."""
        self._folder = folder
        self.address = f"unix:{folder / SOCKET_FILE}"
        self._command: list[str] = []  # empty if another process has started the daemon
        self._child: subprocess.Popen[bytes] | None = None
        self._joined_pid: int | None = None
        self._reviving = threading.Lock()
        self._hold = -1

    @classmethod
    def start(cls, store: Path, dram: str | int | None) -> PrivateDaemon:
        """Starts a child process. Raises StartError where no folder can hold its socket."""
        daemon = cls(_socket_folder())
        os.mkfifo(daemon._folder / USERS_FILE, 0o600)
        daemon._command = [*WEIGHTD, "--store", str(store), "--listen", daemon.address]
        daemon._command += [] if dram is None else ["--dram", str(dram)]
        daemon._start()
        _daemons.add(daemon)
        return daemon

    @classmethod
    def join(cls, address: str, pid: int) -> PrivateDaemon | None:
        """This user's private daemon at `address`, held; None for another. BrokenPipeError: it is about to end."""
        if not address.startswith("unix:/"):
            return None
        daemon = cls(Path(address.removeprefix("unix:")).parent)
        daemon._joined_pid = pid
        try:
            facts = (daemon._folder / USERS_FILE).lstat()
        except (OSError, ValueError):
            return None
        if not stat.S_ISFIFO(facts.st_mode) or facts.st_uid != os.geteuid():
            return None
        try:
            daemon._take_hold()
        except OSError as error:  # ENXIO: no process reads the FIFO
            raise BrokenPipeError(f"the weightd at {address} is about to end") from error
        _daemons.add(daemon)
        return daemon

    def _take_hold(self) -> None:
        self._hold = os.open(self._folder / USERS_FILE, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def _start(self) -> None:
        reading_end = os.open(self._folder / USERS_FILE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if self._hold < 0:
            self._take_hold()
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [*self._command, "--owner-fd", str(reading_end)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[reading_end],
                env=environment(),
                start_new_session=True,  # an interrupt (Ctrl-C) is for its users; the daemon ends after them
            )
        os.close(reading_end)

    def revive(self) -> None:
        """Starts the daemon again if it was killed or stopped. Raises StartError if it failed; repeats its message."""
        with self._reviving:
            if self._child is None or not self.has_ended():
                return
            if self._child.returncode > 0:
                raise StartError(f"the private weightd ended: {self.last_words()}")
            self._start()

    @property
    def _log(self) -> Path:
        return self._folder / "weightd.log"

    @property
    def pid(self) -> int:
        assert self._child is not None, "only the process that has started it asks"
        return self._child.pid

    def has_ended(self) -> bool:
        return self._child is None or self._child.poll() is not None

    def last_words(self) -> str:
        """The last line that the daemon wrote, with this library's names of arguments."""
        lines = self._log.read_text("utf-8", errors="backslashreplace").strip().splitlines()
        assert self._child is not None
        return last_words(lines) or f"it ended with status {self._child.returncode} and no message"

    def let_go(self) -> None:
        """Stops holding the daemon. A forked child does so, because it would keep the daemon alive."""
        os.close(self._hold)
        self._hold = -1
        _daemons.discard(self)

    def stop(self) -> None:
        """Lets go. If no other process holds the daemon, waits for its end, or kills it, and removes its folder."""
        if self._leave():
            return
        if self._child is not None:
            try:
                self._child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        give_up = time.monotonic() + STOP_S
        while self._joined_pid is not None and _lives(self._joined_pid) and time.monotonic() < give_up:
            time.sleep(POLL_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _leave(self) -> bool:
        """Lets go; returns whether other processes still hold the daemon."""
        reading_end = os.open(self._folder / USERS_FILE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self.let_go()
        watch = select.poll()
        watch.register(reading_end, select.POLLIN)
        others = not any(events & select.POLLHUP for _, events in watch.poll(LET_GO_MS))
        os.close(reading_end)
        if others and self._child is not None:
            self._child.returncode = 0  # subprocess warns of a child that outlives its object
        return others


_daemons: weakref.WeakSet[PrivateDaemon] = weakref.WeakSet()
_ahead: dict[Path, PrivateDaemon] = {}  # by store: started, not yet taken


def revive(address: str) -> None:
    """Starts the private daemon at `address` again if this process had started it and it has ended."""
    for daemon in list(_daemons):
        if daemon.address == address:
            daemon.revive()


def _let_go_after_fork() -> None:
    for daemon in list(_daemons):
        daemon.let_go()


os.register_at_fork(after_in_child=_let_go_after_fork)


def _socket_folder() -> Path:
    """A new folder of mode 0700 for a socket, the path of which must be short; preferably in the temporary folder."""
    tried = [tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/dev/shm"]
    for parent in filter(None, tried):
        if unfit_for_a_socket(Path(parent) / "flashclient-12345678" / SOCKET_FILE) is None:
            with suppress(OSError):
                return Path(tempfile.mkdtemp(prefix="flashclient-", dir=parent))
    raise StartError(
        f"no folder for the socket of a private weightd: {tried[0]}, /tmp and /dev/shm cannot be written, or have too "
        "long a path; set TMPDIR to a folder with a short path"
    )
