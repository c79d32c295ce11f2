"""What another user's process can do with a weightd: run by test_access.py as root, and then that user.

    stranger.py USER GROUP,GROUP... COMMAND ARGUMENT ARGUMENT     answers with one JSON object

It becomes that user itself, once all is imported: Python may be installed where only root can read.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

import grpc

from flashclient import _native
from flashclient.channel import Connection
from flashclient.errors import FlashClientError
from weightd_proto import weightd_pb2 as pb

HELLO = struct.Struct("<II16s")
WELCOME = struct.Struct("<IIQQII")
MAGIC, VERSION = 0x676E6972, 2
REQUESTS_OFFSET, WORDS_OFFSET, REQUEST_TAIL_OFFSET = 4096, 4096 + 64 * 32, 64
PR_SET_DUMPABLE = 4
F_ADD_SEALS, F_SEAL_GROW = 1033, 4


def become(user_id: int, group_ids: list[int]) -> None:
    """That user for good, with the first group as its own."""
    os.setgroups(group_ids[1:])
    os.setresgid(group_ids[0], group_ids[0], group_ids[0])
    os.setresuid(user_id, user_id, user_id)
    # A process that was root may not look at its own /proc/self/fd; one that never was may.
    assert ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0


def outcome(call: Callable[[], Any]) -> str:
    """The status's name; OK, or that of the error."""
    try:
        call()
    except grpc.RpcError as error:
        return str(error.code().name)
    except FlashClientError as error:
        cause = error.__cause__
        return str(cause.code().name) if isinstance(cause, grpc.RpcError) else type(error).__name__
    return "OK"


def calls(address: str, model: str) -> dict[str, Any]:
    """What each call answers about `model`."""
    connection = Connection(address, 10.0)
    stub, whole = connection.stub, pb.ByteRange(offset=0, size=1)
    header = pb.PublishCalibrationHeader(model=model, calibration=pb.Calibration(mode="exact"))
    messages = [pb.PublishCalibrationRequest(header=header)]
    return {
        "listed": list(stub.ListModels(pb.ListModelsRequest()).names),
        "counted": [row.name for row in connection.stats().models],
        "describe": outcome(lambda: connection.describe(model)),
        "fetch": outcome(lambda: list(connection.fetch(pb.FetchRequest(model=model, resident=whole)))),
        "open": outcome(lambda: connection.open_session(pb.Model(name=model), 4)),
        "publish": outcome(lambda: stub.PublishCalibration(iter(messages))),
    }


def connect(address: str, suffix: str) -> dict[str, Any]:
    """To a socket of the daemon, without a word."""
    kind = socket.SOCK_SEQPACKET if suffix == ".data" else socket.SOCK_STREAM
    with socket.socket(socket.AF_UNIX, kind) as connection:
        return {"errno": connection.connect_ex(address.removeprefix("unix:") + suffix)}


def attach(data_socket: str, token: str) -> dict[str, Any]:
    """With a token that somebody else was given."""
    try:
        _native.Session(data_socket, bytes.fromhex(token), 10.0)
    except OSError as error:
        return {"refused": str(error)}
    return {"refused": ""}


def write(address: str, model: str) -> dict[str, Any]:
    """Every way to change what others read, tried on the resident weights and on a segment of the pool.

    The same ways on memory of our own, which they must change: else they would prove nothing.
    """
    opened = Connection(address, 10.0).open_session(pb.Model(name=model), 4)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as session:
        session.connect(opened.data_socket)
        session.send(HELLO.pack(MAGIC, VERSION, opened.token))
        message, descriptors, _, _ = socket.recv_fds(session, WELCOME.size, 4)
        assert WELCOME.unpack(message)[5] == 0
        ring, doorbell, resident, *_ = descriptors
        _acquire_first_cell(ring, doorbell)
        _, (segment,), _, _ = socket.recv_fds(session, 8, 1)
        own = os.memfd_create("own", os.MFD_ALLOW_SEALING)
        os.ftruncate(own, 1 << 16)
        return {"resident": _succeeded(resident), "segment": _succeeded(segment), "own": _succeeded(own)}


def _acquire_first_cell(ring: int, doorbell: int) -> None:
    shared = mmap.mmap(ring, 0)
    struct.pack_into("<8I", shared, REQUESTS_OFFSET, 1, 1, 0, 1, 0, 0, 0, 0)  # ACQUIRE, CELLS, layer 0, one word
    struct.pack_into("<I", shared, WORDS_OFFSET, 0)
    struct.pack_into("<I", shared, REQUEST_TAIL_OFFSET, 1)
    os.write(doorbell, struct.pack("<Q", 1))


def _succeeded(descriptor: int) -> list[str]:
    path = f"/proc/self/fd/{descriptor}"
    ways: dict[str, Callable[[], Any]] = {
        "pwrite": lambda: os.pwrite(descriptor, b"x", 0),
        "map it writable": lambda: mmap.mmap(descriptor, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        "open it again": lambda: os.open(path, os.O_RDWR),
        "open it to cut it": lambda: os.open(path, os.O_WRONLY | os.O_TRUNC),
        "change its mode": lambda: os.fchmod(descriptor, 0o666),
        "cut it": lambda: os.ftruncate(descriptor, 4096),
        "cut it by its path": lambda: os.truncate(path, 4096),
        "add a seal": lambda: fcntl.fcntl(descriptor, F_ADD_SEALS, F_SEAL_GROW),
    }
    return [name for name, way in ways.items() if _works(way)]


def _works(way: Callable[[], Any]) -> bool:
    try:
        way()
    except (OSError, ValueError):  # ValueError: mmap of a file that was cut
        return False
    return True


if __name__ == "__main__":
    commands: dict[str, Callable[[str, str], dict[str, Any]]]
    commands = {"calls": calls, "connect": connect, "attach": attach, "write": write}
    become(int(sys.argv[1]), [int(group) for group in sys.argv[2].split(",")])
    print(json.dumps(commands[sys.argv[3]](*sys.argv[4:])))
