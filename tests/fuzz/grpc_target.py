"""Fuzz target: the bytes of gRPC messages in sequences of calls, sent to a real server of this process.

Every call ends in time, with an answer or with a status that says what is wrong with the request, but never with a
fault of the daemon. Meanwhile another client keeps getting the right bytes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from mutators import Mutator, change_message
from tiny_store import TinyModel, write_model

from weightd.gateway.identity import Identities
from weightd.machine.budget import GrowingDram
from weightd.machine.pressure import Triggers
from weightd.serving import serve
from weightd.serving.call_bounds import SERVICE_NAME
from weightd.serving.config import load_config
from weightd.serving.control_plane import ControlPlane
from weightd.serving.endpoints import Endpoints
from weightd.serving.fetch import Fetcher
from weightd.serving.served_models import ServedModels
from weightd.store.store import Store
from weightd.watching.statistics import Statistics
from weightd_proto import weightd_pb2 as pb
from weightd_proto import weightd_pb2_grpc

DRAM_BYTES = 64 << 20
ANSWER_S = 60  # longer is a hang; a busy machine takes seconds
HELLO = struct.Struct("<II16s")
MAGIC, VERSION = 0x676E6972, 2
CALLS_MAX = 12  # of one input
PART_BYTES_MAX = 4096  # of an upload's messages
UNARY = ("ListModels", "DescribeModel", "OpenSession", "Stats")
KINDS = (*UNARY, "Fetch", "PublishCalibration", "attach", "RemoveModel")
MESSAGES: dict[str, type[Message]] = {
    "ListModels": pb.ListModelsRequest,
    "DescribeModel": pb.DescribeModelRequest,
    "OpenSession": pb.OpenSessionRequest,
    "Stats": pb.StatsRequest,
    "RemoveModel": pb.RemoveModelRequest,
    "Fetch": pb.FetchRequest,
    "PublishCalibration": pb.PublishCalibrationRequest,
}
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # sessions that nobody attaches to last for seconds
    grpc.StatusCode.DATA_LOSS,  # a calibration that came with other bytes
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.PERMISSION_DENIED,
}
UNPARSED = ("Exception deserializing request!", "Error parsing message")  # gRPC's answers to bytes of no message


class Served:
    """A server in a thread, and a channel to it."""

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="weightd-fuzz-"))
        logging.disable(logging.CRITICAL)
        self.model: TinyModel = write_model(folder / "store")
        address = f"unix:{folder / 'socket'}"
        arguments = ["--store", str(folder / "store"), "--listen", address, "--io-engine", "threads"]
        self._loop = asyncio.new_event_loop()
        self._told = asyncio.Event()
        ready = threading.Event()
        serving = _serve(arguments, folder, ready, self._told)
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(serving,), daemon=True)
        self._thread.start()
        assert ready.wait(60)
        self.data_socket = str(folder / "data")
        self.tokens: list[bytes] = []  # of sessions that nobody has attached to
        self.channel = grpc.insecure_channel(address)
        self.stub = weightd_pb2_grpc.WeightdStub(self.channel)  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        self.channel.close()
        self._loop.call_soon_threadsafe(self._told.set)
        self._thread.join()
        self._loop.close()
        logging.disable(logging.NOTSET)


async def _serve(arguments: list[str], folder: Path, ready: threading.Event, told: asyncio.Event) -> None:
    config = load_config(arguments)
    store = Store.open(config.store)
    data_socket = str(folder / "data")
    engine = serve._engine(config, DRAM_BYTES, data_socket, Triggers())
    dram = GrowingDram(config.dram, config.dram_floor, DRAM_BYTES, [])
    models = ServedModels(store, engine, dram)
    fetcher, statistics = Fetcher(store, models, engine), Statistics(engine, 0.0)
    control = ControlPlane(models, fetcher, engine, Identities(config.store), data_socket, dram, statistics)
    control.set_rules(config.allow, config.allow_publish)
    endpoints = Endpoints(config, control, None)
    await endpoints.start(Identities(config.store))
    ready.set()
    await told.wait()
    await endpoints.stop()
    endpoints.close()
    control.close()


@cache
def served() -> Served:
    return Served()


def grpc_messages(data: bytes) -> None:
    """Calls in turn, each a byte that says which, two of its message's length, and the message."""
    here = served()
    with ExitStack() as connections:
        for kind, message in split_calls(data)[:CALLS_MAX]:
            try:
                _call(here, KINDS[kind % len(KINDS)], message, connections)
            except grpc.RpcError as error:
                details = error.details() or ""
                unparsed = any(words in details for words in UNPARSED)
                if not unparsed and error.code() not in REFUSALS:
                    raise AssertionError(f"{error.code()}: {details}") from error
        while here.tokens:  # otherwise the sessions would keep their slots for seconds
            _attach(here, b"", connections)
    _expect_right_bytes(here, len(data))


def split_calls(data: bytes) -> list[tuple[int, bytes]]:
    calls = []
    while len(data) >= 3:
        size_bytes = int.from_bytes(data[1:3], "little")
        calls.append((data[0], data[3 : 3 + size_bytes]))
        data = data[3 + size_bytes :]
    return calls


def joined(calls: list[tuple[int, bytes]]) -> bytes:
    return b"".join(bytes([kind]) + len(message).to_bytes(2, "little") + message for kind, message in calls)


def _call(here: Served, kind: str, message: bytes, connections: ExitStack) -> None:
    raw: Any = here.channel  # Any, because its type stubs do not allow messages of bytes
    if kind in (*UNARY, "RemoveModel"):
        answer = raw.unary_unary(f"/{SERVICE_NAME}/{kind}")(message, timeout=ANSWER_S)
        if kind == "OpenSession":
            here.tokens.append(pb.OpenSessionResponse.FromString(answer).token)
    elif kind == "Fetch":
        for _ in raw.unary_stream(f"/{SERVICE_NAME}/Fetch")(message, timeout=ANSWER_S):
            pass
    elif kind == "PublishCalibration":
        parts = _parted(message, here.model)
        raw.stream_unary(f"/{SERVICE_NAME}/PublishCalibration")(parts, timeout=ANSWER_S)
    else:
        _attach(here, message, connections)


def _attach(here: Served, hello: bytes, connections: ExitStack) -> None:
    """Attaches with the token of the last OpenSession. `hello`, if given, replaces the valid Hello."""
    if not hello and here.tokens:
        hello = HELLO.pack(MAGIC, VERSION, here.tokens.pop())
    with suppress(OSError):
        session = connections.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        session.settimeout(ANSWER_S)
        session.connect(here.data_socket)
        session.send(hello)
        _, descriptors, _, _ = socket.recv_fds(session, 64, 4)
        for descriptor in descriptors:
            os.close(descriptor)


def _parted(message: bytes, model: TinyModel) -> Iterator[bytes]:
    """Messages, each after its length in two bytes. If the header names no import, the right one is filled in."""
    while message:
        size_bytes = int.from_bytes(message[:2], "little") % PART_BYTES_MAX
        part, message = message[2 : 2 + size_bytes], message[2 + size_bytes :]
        try:
            request = pb.PublishCalibrationRequest.FromString(part)
            if request.WhichOneof("part") == "header" and not request.header.calibration.import_id:
                request.header.calibration.import_id = model.record.import_id
            yield request.SerializeToString()
        except Exception:
            yield part


def _expect_right_bytes(here: Served, number: int) -> None:
    neuron = number % len(here.model.bundles[1])
    wanted = pb.FetchRequest(model="tiny", bundles=pb.NeuronSet(layer=1, neurons=[neuron]))
    give_up_s = time.monotonic() + 2 * ANSWER_S
    while True:
        try:
            found = b"".join(part.data for part in here.stub.Fetch(wanted, timeout=ANSWER_S))
            break
        except grpc.RpcError as error:  # until the daemon has seen that its clients have gone
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or time.monotonic() > give_up_s:
                raise
    assert found == here.model.bundles[1][neuron].tobytes()


def _mutate(calls: list[tuple[int, bytes]], random: Random) -> bytes:
    """Adds a call, removes one, swaps two, or changes a field of one."""
    at = random.randrange(len(calls)) if calls else 0
    match random.randrange(6):
        case 0 if calls:
            calls.pop(at)
        case 1 if calls:
            calls.insert(random.randrange(len(calls) + 1), calls[at])
        case 2:
            kind = random.randrange(len(KINDS))
            calls.insert(at, (kind, _changed(kind, b"", random)))
        case _ if calls:
            calls[at] = (calls[at][0], _changed(calls[at][0], calls[at][1], random))
    return joined(calls[:CALLS_MAX])


def _changed(kind: int, message: bytes, random: Random) -> bytes:
    """The message with some of its fields changed. It has at most 60 KiB, so that its length fits into two bytes."""
    made = MESSAGES.get(KINDS[kind % len(KINDS)])
    if made is None:
        return random.choice((b"", random.randbytes(24), random.randbytes(300)))
    if made is pb.PublishCalibrationRequest:
        return _changed_parts(message, random)
    try:
        parsed = made.FromString(message)
    except DecodeError:
        parsed = made()
    change_message(parsed, random)
    changed = parsed.SerializeToString()
    return changed if len(changed) < 60 << 10 else message


def _changed_parts(message: bytes, random: Random) -> bytes:
    parts = []
    while message:
        size_bytes = int.from_bytes(message[:2], "little") % PART_BYTES_MAX
        part, message = message[2 : 2 + size_bytes], message[2 + size_bytes :]
        with suppress(DecodeError):
            parts.append(pb.PublishCalibrationRequest.FromString(part))
    if not parts or random.randrange(8) == 0:
        parts.append(pb.PublishCalibrationRequest(data=random.randbytes(random.choice((0, 1, 64, 300)))))
    change_message(random.choice(parts), random)
    packed = [part.SerializeToString()[: PART_BYTES_MAX - 1] for part in parts]
    return b"".join(len(part).to_bytes(2, "little") + part for part in packed)[: 60 << 10]


TARGETS: dict[str, Callable[[bytes], None]] = {"grpc_messages": grpc_messages}
MUTATORS: dict[str, Mutator] = {"grpc_messages": Mutator(split_calls, _mutate)}
