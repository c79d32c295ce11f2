"""The weightd of a store: the one that serves it already, or a private child of this process.

Who serves a store is written in STORE/weightd.lock, which its daemon holds locked: {"pid": ..., "address": ...}. Asking
that address, rather than trying the lock, disturbs no daemon that is about to take it. Of two processes that start one
at the same time the daemon's own lock picks the winner; the other attaches to it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from contextlib import suppress
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flashclient.channel import Connection
from flashclient.errors import StartError

LOCK_FILE = "weightd.lock"
POLL_S = 0.02
HEALTH_S = 2.0  # for one answer of a busy daemon
STOP_S = 10.0  # a stopping daemon finishes its reads and closes its sessions first


def attach_or_start(store: Path, dram: str | int | None, timeout_s: float) -> tuple[str, PrivateDaemon | None]:
    """The address of the weightd that serves `store`, and the child if it had to be started.

    Raises:
        StartError: it could not be started; says what it said.
    """
    address = serving_address(store)
    if address is not None:
        _tell_that_dram_is_not_ours(address, dram, timeout_s)
        return address, None
    daemon = PrivateDaemon(store, dram)
    deadline = time.monotonic() + timeout_s
    while not daemon.has_ended():
        if is_serving(daemon.address):
            return daemon.address, daemon
        if time.monotonic() > deadline:
            daemon.stop()
            raise StartError(f"weightd for {store} was not ready within {timeout_s:g} s: raise timeout_s")
        time.sleep(POLL_S)
    said = daemon.last_words()
    daemon.stop()
    winner = _wait_for_winner(store, deadline)
    if winner is None:
        raise StartError(f"cannot start weightd for {store}: {said}")
    _tell_that_dram_is_not_ours(winner, dram, timeout_s)
    return winner, None


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


def _wait_for_winner(store: Path, deadline: float) -> str | None:
    """The address of a daemon that holds the lock and comes to serve; None if no live process claims the store."""
    while time.monotonic() < deadline and _process_in_lock_lives(store):
        if address := serving_address(store):
            return address
        time.sleep(POLL_S)
    return None


def _lock(store: Path) -> dict[str, object]:
    """What the lock file says; empty where there is none or it is being written."""
    try:
        content = json.loads((store / LOCK_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def serving_address(store: Path) -> str | None:
    """Of the daemon that serves `store`; None if none does yet. A lock file may outlive its process."""
    address = _lock(store).get("address")
    if isinstance(address, str) and _process_in_lock_lives(store) and is_serving(address):
        return address
    return None


def _process_in_lock_lives(store: Path) -> bool:
    pid = _lock(store).get("pid")
    return isinstance(pid, int) and Path(f"/proc/{pid}").exists()


def is_serving(address: str) -> bool:
    """Whether a weightd at `address` says now that it serves."""
    # A new channel each time: one that failed to connect waits a second before it tries again.
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options) as channel, suppress(grpc.RpcError):
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_S)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
    return False


class PrivateDaemon:
    """A weightd that ends with its owner: it holds the reading end of a pipe whose writing end is only here."""

    def __init__(self, store: Path, dram: str | int | None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="flashclient-"))  # mode 0700: the socket is the owner's alone
        self.address = f"unix:{self._folder / 'weightd.sock'}"
        self._log = self._folder / "weightd.log"
        self._command = [sys.executable, "-m", "weightd", "--store", str(store), "--listen", self.address]
        self._command += [] if dram is None else ["--dram", str(dram)]
        self._reviving = threading.Lock()
        self._start()
        _daemons.add(self)

    def _start(self) -> None:
        reading_end, self._writing_end = os.pipe()
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [*self._command, "--owner-fd", str(reading_end)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[reading_end],
                start_new_session=True,  # an interrupt is for the owner; the daemon follows when the owner ends
            )
        os.close(reading_end)

    def revive(self) -> None:
        """Starts it again if it was killed or stopped. Raises StartError if it ended by a fault; says what it said."""
        with self._reviving:
            if not self.has_ended():
                return
            if self._child.returncode > 0:
                raise StartError(f"the private weightd ended: {self.last_words()}")
            os.close(self._writing_end)
            self._start()

    @property
    def pid(self) -> int:
        return self._child.pid

    def has_ended(self) -> bool:
        return self._child.poll() is not None

    def last_words(self) -> str:
        """The last line it wrote."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with status {self._child.returncode} and said nothing"

    def let_go(self) -> None:
        """Closes the pipe of a forked child of the owner, which would keep the daemon alive."""
        os.close(self._writing_end)

    def stop(self) -> None:
        """Ends the daemon and removes its folder; kills it if it does not end by itself."""
        os.close(self._writing_end)
        try:
            self._child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        _daemons.discard(self)
        shutil.rmtree(self._folder, ignore_errors=True)


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


def import_if_path(store: Path, model: str) -> str:
    """The name of `model` in `store`: itself, or of a checkpoint, imported now unless the store has it already.

    Raises:
        StartError: the import failed, says what it said; or the store has another checkpoint of that name.
    """
    source = Path(model)
    if (store / model / "bundles.bin").exists() or not source.exists():
        return model
    name = source.resolve().name if source.is_dir() else source.stem
    if (store / name / "bundles.bin").exists():
        _require_same_source(store, name, source)
        return name
    command = [sys.executable, "-m", "weightd", "import", str(source), "--store", str(store), "--name", name]
    _output_of(command, f"cannot import {source}")
    return name


def _require_same_source(store: Path, name: str, source: Path) -> None:
    """Two checkpoints may have the same last part of their paths."""
    command = [sys.executable, "-m", "weightd", "ls", "--store", str(store), "--json"]
    models = json.loads(_output_of(command, f"cannot list the models of {store}"))["models"]
    imported = next((model["source"] for model in models if model["name"] == name), "")
    if Path(imported).resolve() != source.resolve():
        raise StartError(
            f"{store} has a model '{name}' already, imported from {imported or 'an unknown place'}, not from "
            f"{source.resolve()}: pass '{name}' to use that one, or import yours first with "
            f"`weightd import {source} --store {store} --name NAME` and pass NAME"
        )


def _output_of(command: list[str], failed: str) -> str:
    """What `command` writes; StartError with the last line of its errors."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise StartError(f"{failed}: {lines[-1]}")
    return done.stdout
