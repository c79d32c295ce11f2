#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Runs all hostile clients, each in its own process, as another user if this script runs as root.

    scripts/hostile_clients.py --socket PATH --model NAME [--port PORT] [--user 1600] [--attack NAME]...

runs them against a weightd until the script is ended. --list explains them. The other user has the daemon's group, so
it may attach. All run at the lowest priority: they harm others through the work that weightd does for them, and not
through their own use of the processors.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import grpc
from flags import FlagParser
from soaking import hostile_frames as frames
from soaking import hostile_rings as rings
from soaking.hostile_frames import AGAIN_S, Target
from soaking.hostile_rings import Control
from soaking.parent import ParentProcess

from weightd_proto import weightd_pb2 as pb

USER = 1600  # a user id that no account has
LOWEST = 19  # the lowest priority, as a nice value
PR_SET_PDEATHSIG = 1
THREADS = 12  # threads of refused_requests
UNREAD = 64  # streams whose answers are never read
Ask = Callable[[Control, bytes], object]


def refused_requests(target: Target) -> None:
    """Requests that are refused after they were read: too many fields, too long names, too much data."""
    asks: list[Ask] = [_many_files, _long_mode, _many_ranges, _long_name, _long_import_id, _too_long]

    def ask_for_ever(number: int) -> None:
        while True:
            with suppress(grpc.RpcError, OSError):
                control = Control(target)
                import_id = control.describe().import_id
                while True:
                    _refused(asks[number % len(asks)], control, import_id)
                    number += 1
            time.sleep(AGAIN_S)

    for number in range(THREADS - 1):
        threading.Thread(target=ask_for_ever, args=(number,), daemon=True).start()
    ask_for_ever(THREADS - 1)


def _refused(ask: Ask, control: Control, import_id: bytes) -> None:
    try:
        ask(control, import_id)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            raise


def _publish(control: Control, calibration: pb.Calibration) -> object:
    header = pb.PublishCalibrationHeader(model=control.target.model, calibration=calibration)
    return control.stub.PublishCalibration(iter([pb.PublishCalibrationRequest(header=header)]), **control.who)


def _many_files(control: Control, import_id: bytes) -> object:
    return _publish(control, pb.Calibration(import_id=import_id, mode="exact", files=[pb.File()] * 400_000))


def _long_mode(control: Control, import_id: bytes) -> object:
    return _publish(control, pb.Calibration(import_id=import_id, mode="x" * 900_000))


def _many_ranges(control: Control, _: bytes) -> object:
    wanted = pb.NeuronSet(layer=0, positions=[pb.Range()] * 520_000)
    return list(control.stub.Fetch(pb.FetchRequest(model=control.target.model, bundles=wanted), **control.who))


def _long_name(control: Control, _: bytes) -> object:
    return control.stub.DescribeModel(pb.DescribeModelRequest(name="x" * 1_000_000), **control.who)


def _long_import_id(control: Control, _: bytes) -> object:
    request = pb.OpenSessionRequest(model=control.target.model, import_id=b"x" * 1_000_000)
    return control.stub.OpenSession(request, **control.who)


def _too_long(control: Control, _: bytes) -> object:
    return control.stub.DescribeModel(pb.DescribeModelRequest(name="x" * 30_000_000), **control.who)


def unread_streams(target: Target) -> None:
    """Streams of whole layers whose answers are not read."""
    wanted = pb.FetchRequest(model=target.model, resident=pb.ByteRange(offset=0, size=1 << 20))
    while True:
        with suppress(grpc.RpcError, OSError):
            control = Control(target)
            streams = [control.stub.Fetch(wanted, metadata=control.who["metadata"]) for _ in range(UNREAD)]
            while not all(stream.done() for stream in streams):
                time.sleep(1)
        time.sleep(AGAIN_S)


ATTACKS: dict[str, Callable[[Target], None]] = {
    attack.__name__: attack
    for attack in (
        frames.half_sent_calls, frames.trickling_uploads, frames.continuation_flood,
        frames.continuation_flood_over_tcp, frames.idle_connections, frames.silent_connections_over_tcp,
        frames.rapid_resets, frames.junk_frames, frames.identities_without_end, rings.sessions_without_attaching,
        rings.silent_data_connections, rings.data_socket_junk, rings.ring_hoarder, rings.futex_herd,
        rings.acquire_flood, rings.lease_hoarder, rings.ring_junk, refused_requests, unread_streams,
    )
}  # fmt: skip


class HostileClients:
    """Runs attacks for the length of a `with` statement."""

    def __init__(self, target: Target, names: Sequence[str] = tuple(ATTACKS), user: int = USER) -> None:
        self._command = [
            sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--socket", target.path, "--model",
            target.model, "--port", str(target.port), "--user", str(user),
        ]  # fmt: skip
        self._command += [word for name in names for word in ("--attack", name)]

    def __enter__(self) -> HostileClients:
        """RuntimeError when they cannot reach the daemon."""
        self._parent = ParentProcess(self._command)
        if not self._parent.stdout.readline():
            raise RuntimeError(f"the hostile clients ended with status {self._parent.wait()}")
        return self

    @property
    def pid(self) -> int:
        """The process id of their parent."""
        return self._parent.pid

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = self._parent.end()
        if kind is None and status:
            raise RuntimeError("a hostile client gave up: its standard error says why")


def become_hostile(user: int) -> None:
    """Makes this process one of `user` with our group, if that is allowed. It gets the lowest priority and ends with
    its parent."""
    os.nice(LOWEST)
    if os.geteuid() == 0:
        os.setgroups([os.getegid()])
        os.setresuid(user, user, user)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    rings.allow_many_descriptors()


def _fork(work: Callable[[Target], None], target: Target, user: int) -> int:
    """Forks a child that runs the attack as `user`. Its exit status is 0 only if the attack returns."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            become_hostile(user)
            work(target)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def _until_killed(attack: Callable[[Target], None]) -> Callable[[Target], None]:
    def attack_for_ever(target: Target) -> None:
        while True:
            with suppress(OSError, grpc.RpcError):  # weightd does not run
                attack(target)
            time.sleep(AGAIN_S)

    return attack_for_ever


def reach(target: Target) -> None:
    """Raises OSError if weightd cannot be reached: then no attack would show anything."""
    target.identity()
    target.connect().close()


def main() -> int:
    parser = FlagParser(__doc__)
    parser.add_argument("--socket", help="path of weightd's gRPC socket")
    parser.add_argument("--model", help="a model that it serves")
    parser.add_argument("--port", type=int, default=0, help="weightd's port on loopback TCP")
    parser.add_argument("--user", type=int, default=USER, help="user id of their processes, if started as root")
    parser.add_argument(
        "--attack", action="append", choices=sorted(ATTACKS), help="run only this one; can be repeated (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="list the hostile clients")
    options = parser.parse_args()
    if options.list:
        for name, attack in ATTACKS.items():
            print(f"{name:28} {inspect.getdoc(attack)}")
        return 0
    target = Target(options.socket, options.port, options.model)
    names = options.attack or [name for name in ATTACKS if target.port or not name.endswith("_over_tcp")]
    import encodings.idna  # noqa: F401  # before the fork, because another user may not be able to read Python's files

    if os.waitpid(_fork(reach, target, options.user), 0)[1]:
        return 1
    pids = [_fork(_until_killed(ATTACKS[name]), target, options.user) for name in names]
    print(f"{len(pids)} hostile clients run", flush=True)
    with suppress(KeyboardInterrupt):
        while os.read(0, 1):  # until the process that started this one closes it
            pass
    gave_up = [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0]]
    for pid in set(pids) - set(gave_up):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return 1 if gave_up else 0


if __name__ == "__main__":
    sys.exit(main())
