"""A weightd in a process of its own, as a user starts it, for the tests to talk to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from weightd_proto import weightd_pb2_grpc

START_WITHIN_S = 60
# Root passes the memlock limit by its capability; without that it meets the limit of an ordinary user.
MEMLOCK_OF_A_USER = ("prlimit", "--memlock=8388608", "setpriv", "--bounding-set", "-ipc_lock", "--")
STOP_WITHIN_S = 30


@dataclass
class Daemon:
    """The process, its address, and a channel to it."""

    process: subprocess.Popen[str]
    address: str
    channel: grpc.Channel
    owner_fd: int  # closing it ends the daemon
    log: str = ""  # its standard error, once it has ended

    @property
    def stub(self) -> weightd_pb2_grpc.WeightdStub:
        return weightd_pb2_grpc.WeightdStub(self.channel)  # type: ignore[no-untyped-call]

    def stop(self) -> tuple[int, str]:
        """SIGTERM; the exit status and what was written to standard error."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """Until it ends by itself."""
        _, self.log = self.process.communicate(timeout=STOP_WITHIN_S)
        return self.process.returncode, self.log


def command(store: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "weightd", "--store", str(store), *flags]


def refused(store: Path, *flags: str, prefix: Sequence[str] = ()) -> tuple[int, str]:
    """Exit status and standard error of a weightd that must not start."""
    started = [*prefix, *command(store, *flags)]
    done = subprocess.run(started, capture_output=True, text=True, timeout=START_WITHIN_S, check=False)
    return done.returncode, done.stderr


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(
    store: Path,
    *flags: str,
    address: str | None = None,
    prefix: Sequence[str] = (),
    credentials: grpc.ChannelCredentials | None = None,
) -> Iterator[Daemon]:
    """A daemon that answers, stopped at the end; by default at a socket beside the store. `prefix` starts it."""
    address = address or f"unix:{store}.sock"
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [*prefix, *command(store, "--listen", address, "--owner-fd", str(reading), *flags)],
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[reading],
    )
    os.close(reading)
    channel = grpc.insecure_channel(address) if credentials is None else grpc.secure_channel(address, credentials)
    daemon = Daemon(process, address, channel, writing)
    try:
        _await_serving(daemon)
        yield daemon
    finally:
        daemon.channel.close()
        if process.poll() is None:
            daemon.stop()
        if process.stderr is not None:
            process.stderr.close()
        os.close(daemon.owner_fd)


def _await_serving(daemon: Daemon) -> None:
    health = health_pb2_grpc.HealthStub(daemon.channel)
    request = health_pb2.HealthCheckRequest(service="weightd.v1.Weightd")
    for _ in range(START_WITHIN_S):
        with suppress(grpc.RpcError):
            answer = health.Check(request, wait_for_ready=True, timeout=1)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            return
        if daemon.process.poll() is not None:
            raise AssertionError(f"weightd ended: {daemon.wait()}")
    raise AssertionError(f"not serving within {START_WITHIN_S} s")
