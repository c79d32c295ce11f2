"""The weightd of a store: the one that serves it already, or a private child of this process.

Who serves a store is written in STORE/weightd.lock, which its daemon holds locked: {"pid": ..., "address": ...}. Asking
that address, rather than trying the lock, disturbs no daemon that is about to take it. Of several processes that start
one at the same time the daemon's own lock picks the winner; the others attach to it.

A private daemon ends with the last of those who use it: beside its socket lies a FIFO, and it serves as long as
somebody holds that open for writing. All of them are processes of one user, because the folder is that user's alone.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flashclient.daemon.address import NO_TLS, parse_address
from flashclient.daemon.channel import Connection, open_channel
from flashclient.errors import ModelNotFoundError, OptionError, StartError
from weightd_proto.addresses import SOCKET_FILE, unfit_for_a_socket
from weightd_proto.files import BUNDLES_FILE, DAEMON_LOCK_FILE

LOCK_BYTES_MAX = 4096
USERS_FILE = "users"  # the FIFO
POLL_S = 0.02
LET_GO_MS = 200  # a child that was forked a moment ago lets go as soon as it runs
HEALTH_S = 2.0  # for one answer of a busy daemon
STOP_S = 10.0  # a stopping daemon finishes its reads and closes its sessions first

logger = logging.getLogger("flashclient")


def attach_or_start(store: Path, dram: str | int | None, timeout_s: float) -> tuple[str, PrivateDaemon | None]:
    """The address of the weightd that serves `store`; and it, to be stopped, if it is a private one.

    Raises:
        StartError: it could not be started; says what it said.
    """
    deadline = time.monotonic() + timeout_s
    while (found := _attach(store)) is None:
        daemon = PrivateDaemon.start(store, dram)
        was_rival = _await_serving(daemon, store, deadline)
        if not daemon.has_ended():
            return daemon.address, daemon
        said = daemon.last_words()
        daemon.stop()
        if not was_rival:  # it was not another daemon that kept it from the store
            raise StartError(f"cannot start weightd for {store}: {said}")
        while (found := _attach(store)) is None and _rival(store) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if found is not None:
            break
        if time.monotonic() > deadline:
            raise StartError(f"cannot start weightd for {store}: {said}")
    _tell_that_dram_is_not_ours(found[0], dram, timeout_s)
    return found


def _await_serving(daemon: PrivateDaemon, store: Path, deadline: float) -> bool:
    """Until it serves or has ended. Returns whether another daemon was seen at the store.

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


def _tell_that_dram_is_not_ours(address: str, dram: str | int | None, timeout_s: float) -> None:
    """Whoever started the daemon has chosen its --dram."""
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
    """What the lock file says; empty where there is none, it is being written, or holds something else."""
    try:
        with (store / DAEMON_LOCK_FILE).open("rb") as file:
            content = json.loads(file.read(LOCK_BYTES_MAX))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _rival(store: Path, own_pid: int | None = None) -> bool:
    """Whether another live process than `own_pid` claims the store. A lock file may outlive its process."""
    pid = _lock(store).get("pid")
    return isinstance(pid, int) and pid != own_pid and _lives(pid)


def _lives(pid: int) -> bool:
    """Whether the process runs: one that has ended does not, even before its parent has asked for its status."""
    try:
        process = os.pidfd_open(pid)
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    except OSError:  # a kernel or filter without pidfds; or no such number of a process
        return Path(f"/proc/{pid}").exists()
    try:
        return not select.select([process], [], [], 0)[0]
    finally:
        os.close(process)


def _attach(store: Path) -> tuple[str, PrivateDaemon | None] | None:
    """The daemon that serves `store`, kept alive from now on if it is a private one; None if none serves yet."""
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


def serving_address(store: Path) -> str | None:
    """Of the daemon that serves `store`; None if none does yet."""
    found = _attach(store)
    if found is None:
        return None
    address, daemon = found
    if daemon is not None:
        daemon.let_go()
    return address


def is_serving(address: str) -> bool:
    """Whether a weightd at `address` says now that it serves."""
    try:
        parsed = parse_address(address)
    except OptionError:
        return False
    # A new channel each time: one that failed to connect waits a second before it tries again.
    with open_channel(parsed, NO_TLS, ("grpc.use_local_subchannel_pool", 1)) as channel, suppress(grpc.RpcError):
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_S)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
    return False


class PrivateDaemon:
    """A weightd that ends with the last of its users: each of them holds the FIFO open that it reads."""

    def __init__(self, folder: Path) -> None:
        """`start` or `join` makes one. `folder`: of its socket, this user's alone; it goes with the daemon."""
        self._folder = folder
        self.address = f"unix:{folder / SOCKET_FILE}"
        self._command: list[str] = []  # none for what another process has started
        self._child: subprocess.Popen[bytes] | None = None
        self._joined_pid: int | None = None
        self._reviving = threading.Lock()
        self._hold = -1

    @classmethod
    def start(cls, store: Path, dram: str | int | None) -> PrivateDaemon:
        """One of our own. Raises StartError where it can have no socket."""
        daemon = cls(_socket_folder())
        os.mkfifo(daemon._folder / USERS_FILE, 0o600)
        daemon._command = [*CHILD, "--store", str(store), "--listen", daemon.address]
        daemon._command += [] if dram is None else ["--dram", str(dram)]
        daemon._start()
        _daemons.add(daemon)
        return daemon

    @classmethod
    def join(cls, address: str, pid: int) -> PrivateDaemon | None:
        """The private daemon of this user at `address`; None for what is none. BrokenPipeError: it is about to end."""
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
        except OSError as error:  # ENXIO: nobody reads it
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
                env=_environment(),
                start_new_session=True,  # an interrupt is for its users; the daemon follows when they end
            )
        os.close(reading_end)

    def revive(self) -> None:
        """Starts it again if it was killed or stopped. Raises StartError if it ended by a fault; says what it said."""
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
        assert self._child is not None, "only whoever has started it asks"
        return self._child.pid

    def has_ended(self) -> bool:
        return self._child is None or self._child.poll() is not None

    def last_words(self) -> str:
        """The last line it wrote, in terms of our arguments."""
        lines = self._log.read_text("utf-8", errors="backslashreplace").strip().splitlines()
        assert self._child is not None
        return _in_our_words(lines) or f"it ended with status {self._child.returncode} and said nothing"

    def let_go(self) -> None:
        """Leaves it to its other users, or to its end; a forked child does, which would keep it alive."""
        os.close(self._hold)
        self._hold = -1
        _daemons.discard(self)

    def stop(self) -> None:
        """Lets go. If nobody else holds it, waits for its end, kills it if it does not come, and removes its folder."""
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
        """Lets go; returns whether others hold it still."""
        reading_end = os.open(self._folder / USERS_FILE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self.let_go()
        watch = select.poll()
        watch.register(reading_end, select.POLLIN)
        others = not any(events & select.POLLHUP for _, events in watch.poll(LET_GO_MS))
        os.close(reading_end)
        if others and self._child is not None:
            self._child.returncode = 0  # subprocess complains about one that outlives its object
        return others


_daemons: weakref.WeakSet[PrivateDaemon] = weakref.WeakSet()


def revive(address: str) -> None:
    """Starts the private daemon at `address` again if it has ended; does nothing where that is none of this process."""
    for daemon in list(_daemons):
        if daemon.address == address:
            daemon.revive()


def _let_go_after_fork() -> None:
    for daemon in list(_daemons):
        daemon.let_go()


os.register_at_fork(after_in_child=_let_go_after_fork)


def _socket_folder() -> Path:
    """A new folder with mode 0700, in which a socket's path is short enough; that of temporary files if it is."""
    tried = [tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/dev/shm"]
    for parent in filter(None, tried):
        if unfit_for_a_socket(Path(parent) / "flashclient-12345678" / SOCKET_FILE) is None:
            with suppress(OSError):
                return Path(tempfile.mkdtemp(prefix="flashclient-", dir=parent))
    raise StartError(
        f"no folder for the socket of a private weightd: {tried[0]}, /tmp and /dev/shm have too long a path or cannot "
        "be written; set TMPDIR to one with a short path"
    )


def import_if_path(store: Path, model: str, rehearsal: AbstractContextManager[int]) -> str:
    """The name of `model` in `store`: itself, or of a checkpoint, imported now unless the store has it as it is.

    A name in the store comes first, unless it is that of the very checkpoint which lies here under the same name.

    Args:
        rehearsal: gives the descriptor for --rehearse-fd.

    Raises:
        ModelNotFoundError: there is no such path.
        StartError: the import failed, says what it said; or the store has another checkpoint of that name, or this one
            as it was earlier and cannot import it again.
    """
    if "/" in model and not os.path.exists(model):  # noqa: PTH110
        raise ModelNotFoundError(
            f"no file or folder '{model}', and no model of a store is called so: no hub is asked; download the model, "
            "then give its folder"
        )
    if not os.path.exists(model) or (_is_stored(store, model) and not _is_source_of(store, model)):  # noqa: PTH110
        return model
    command = [*CHILD, "import", os.path.abspath(model), "--store", str(store), "--update", "--json"]  # noqa: PTH100
    with rehearsal as descriptor:
        command += ["--rehearse-fd", str(descriptor)]
        result = json.loads(_output_of(command, f"cannot import {model}", descriptor))
    if result["done"] == "replaced":
        logger.warning("%s has changed since it was imported as '%s': imported it again", model, result["name"])
    return str(result["name"])


def _is_stored(store: Path, name: str) -> bool:
    return os.path.basename(name) == name not in (".", "..") and (store / name / BUNDLES_FILE).exists()  # noqa: PTH119


def _is_source_of(store: Path, name: str) -> bool:
    """Whether the model was imported from what lies at the path `name`."""
    models = json.loads(_output_of([*CHILD, "ls", "--store", str(store), "--json"], f"cannot list {store}"))["models"]
    return any(model["name"] == name and Path(model["source"]).resolve() == Path(name).resolve() for model in models)


# -P: nothing is imported from the folder that the user happens to be in.
CHILD = [sys.executable, "-P", "-m", "weightd"]


def _environment() -> dict[str, str]:
    """Ours, without those entries of PYTHONPATH that stand for the current folder."""
    environment = dict(os.environ)
    if path := environment.pop("PYTHONPATH", ""):
        kept = [entry for entry in path.split(os.pathsep) if entry.strip("./") or entry.startswith(("/", ".."))]
        environment |= {"PYTHONPATH": os.pathsep.join(kept)} if kept else {}
    return environment


def _output_of(command: list[str], failed: str, *descriptors: int) -> str:
    """What `command` writes; StartError with the last line of its errors. It is stopped if we are interrupted.

    `descriptors`: that it gets beside the standard streams.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="backslashreplace",
        env=_environment(),
        pass_fds=descriptors,
    ) as child:
        try:
            output, errors = child.communicate()
        except BaseException:
            child.terminate()  # it takes back what it has written
            raise
    if child.returncode != 0:
        said = _in_our_words(errors.strip().splitlines()) or f"it ended with status {child.returncode}"
        raise StartError(f"{failed}: {said}")
    return output


def _in_our_words(lines: list[str]) -> str:
    """The last of the lines that a weightd wrote, with our argument in place of its flag."""
    return re.sub(r"--dram\b(?!-) ?", "dram=", lines[-1].removeprefix("weightd: ")) if lines else ""
