"""Clients that misbehave as sessions: on the data socket and in the ring, written from proto/ring.h alone.

Each goes on until it is killed. None uses flashclient.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import grpc

from soaking.hostile_frames import AGAIN_S, Target
from weightd_proto import weightd_pb2 as pb
from weightd_proto import weightd_pb2_grpc

HELLO = struct.Struct("<II16s")
MAGIC, VERSION = 0x676E6972, 2
WELCOME_BYTES = 40
REQUESTS, WORDS = 64, 1024
REQUEST_TAIL, GRANT_HEAD, CLIENT_SLEEPS, REQUEST_HEAD, GRANT_TAIL, BELL = 64, 68, 72, 128, 132, 136
REQUESTS_OFFSET = 4096
WORDS_OFFSET = REQUESTS_OFFSET + REQUESTS * 32
ACQUIRE, RELEASE, PREFETCH = 1, 2, 3
CELLS, RANGES = 1, 2
FUTEX_WAIT, FUTEX = 0, {"x86_64": 202, "aarch64": 98}
HERD = 400  # threads of futex_herd
STEP = 128  # cells at once
ANSWER_S = 10.0
RINGS_KEPT = 600
HELLO_BYTES_MAX = 300


class Control:
    """The calls of weightd.proto, on a gRPC channel of its own."""

    def __init__(self, target: Target) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        options += [("grpc.max_send_message_length", -1)]
        self.target = target
        self.channel = grpc.insecure_channel(f"unix:{target.path}", options)
        self.stub = weightd_pb2_grpc.WeightdStub(self.channel)  # type: ignore[no-untyped-call]
        self.who = {"metadata": [("weightd-identity-bin", target.identity())], "timeout": ANSWER_S}

    def describe(self) -> pb.Model:
        described: pb.Model = self.stub.DescribeModel(pb.DescribeModelRequest(name=self.target.model), **self.who)
        return described

    def open(self, slots: int = 4) -> pb.OpenSessionResponse:
        request = pb.OpenSessionRequest(model=self.target.model, slots_wanted=slots)
        opened: pb.OpenSessionResponse = self.stub.OpenSession(request, **self.who)
        return opened


class Ring:
    """An attached session."""

    def __init__(self, opened: pb.OpenSessionResponse) -> None:
        """Raises OSError if the daemon refuses it."""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(ANSWER_S)
        self.socket.connect(opened.data_socket)
        self.socket.send(HELLO.pack(MAGIC, VERSION, opened.token))
        _, self.descriptors, _, _ = socket.recv_fds(self.socket, WELCOME_BYTES, 4)
        if len(self.descriptors) < 3:
            raise OSError("no session")
        self.ring, self.doorbell = self.descriptors[:2]
        self.map = mmap.mmap(self.ring, 0)
        self.tail = 0

    def word(self, offset: int) -> int:
        return int(struct.unpack_from("<I", self.map, offset)[0])

    def put(self, op: int, form: int, layer: int, words: list[int]) -> None:
        """Writes a request and rings the doorbell."""
        place = self.tail % REQUESTS
        struct.pack_into(f"<{len(words)}I", self.map, WORDS_OFFSET + place * WORDS * 4, *words)
        struct.pack_into("<8I", self.map, REQUESTS_OFFSET + place * 32, op, form, layer, len(words), 0, 0, 0, 0)
        self.tail += 1
        struct.pack_into("<I", self.map, REQUEST_TAIL, self.tail & 0xFFFFFFFF)
        os.write(self.doorbell, struct.pack("<Q", 1))

    def read_grants(self) -> None:
        """Marks all answers as read."""
        struct.pack_into("<I", self.map, GRANT_HEAD, self.word(GRANT_TAIL))

    def is_open(self) -> bool:
        """Receives what the daemon sends, and closes the descriptors of segments."""
        self.socket.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                message, descriptors, _, _ = socket.recv_fds(self.socket, 64, 4)
                for descriptor in descriptors:
                    os.close(descriptor)
                if not message:
                    return False
        return True

    def close(self, *, keep_ring: bool = False) -> None:
        """Closes the connection. `keep_ring` leaves the ring's descriptor open."""
        self.map.close()
        self.socket.close()
        for descriptor in self.descriptors:
            if not (keep_ring and descriptor == self.ring):
                os.close(descriptor)


@contextmanager
def attached(control: Control, slots: int = 4) -> Iterator[Ring]:
    """A session, opened again when it is lost. Raises if the daemon refuses one."""
    ring = Ring(control.open(slots))
    try:
        yield ring
    finally:
        ring.close()


def sessions_without_attaching(target: Target) -> None:
    """Opens the largest possible sessions and attaches to none."""
    control = Control(target)
    while True:
        try:
            control.open(0)
        except grpc.RpcError:
            time.sleep(AGAIN_S)


def silent_data_connections(target: Target) -> None:
    """As many silent connections to the data socket as possible."""
    held: list[socket.socket] = []
    while True:
        with suppress(OSError):
            while len(held) < 64:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                held.append(connection)
                connection.setblocking(False)
                connection.connect(target.path + ".data")
        for connection in list(held):
            try:
                closed = connection.recv(1) == b""
            except BlockingIOError:
                closed = False
            except OSError:
                closed = True
            if closed:
                held.remove(connection)
                connection.close()
        time.sleep(AGAIN_S)


def data_socket_junk(target: Target) -> None:
    """Invalid greetings with unwanted descriptors."""
    chance = random.Random(1)
    while True:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(ANSWER_S)
            connection.connect(target.path + ".data")
            hello = HELLO.pack(MAGIC, chance.choice((VERSION, 3)), chance.randbytes(16))
            hello = chance.choice((hello, chance.randbytes(chance.randrange(1, HELLO_BYTES_MAX))))
            socket.send_fds(connection, [hello], [connection.fileno()] * chance.randrange(8))
        time.sleep(AGAIN_S)


def ring_hoarder(target: Target) -> None:
    """Keeps the rings of sessions that it has closed, and writes to all their pages."""
    control, kept = Control(target), []
    while True:
        try:
            ring = Ring(control.open())
            ring.map[:] = bytes(len(ring.map))
            ring.close(keep_ring=True)
            kept.append(ring.ring)
        except (OSError, grpc.RpcError):
            time.sleep(AGAIN_S)
        if len(kept) > RINGS_KEPT:
            for descriptor in kept:
                os.close(descriptor)
            kept = []


def futex_herd(target: Target) -> None:
    """Lets many threads wait on its ring's futex `bell`, and acquires one cell after another."""
    control, libc = Control(target), ctypes.CDLL(None, use_errno=True)
    threading.stack_size(1 << 16)

    def park(bell: ctypes.c_uint32, ended: threading.Event) -> None:
        second = struct.pack("<qq", 1, 0)
        while not ended.is_set():
            libc.syscall(FUTEX[os.uname().machine], ctypes.byref(bell), FUTEX_WAIT, bell.value, second, None, 0)

    while True:
        with suppress(OSError, grpc.RpcError):
            ring, ended = Ring(control.open()), threading.Event()  # never unmapped, because threads read it
            bell = ctypes.c_uint32.from_buffer(ring.map, BELL)
            threads = [threading.Thread(target=park, args=(bell, ended)) for _ in range(HERD)]
            for thread in threads:
                thread.start()
            while ring.is_open():
                struct.pack_into("<I", ring.map, CLIENT_SLEEPS, 1)
                ring.read_grants()
                ring.put(ACQUIRE, CELLS, 0, [ring.tail % 8])
                ring.put(RELEASE, CELLS, 0, [(ring.tail - 1) % 8])
                time.sleep(AGAIN_S)
            ended.set()
            for thread in threads:
                thread.join()
            ring.socket.close()
        time.sleep(AGAIN_S)


def acquire_flood(target: Target) -> None:
    """Acquires, releases and prefetches cells as fast as the ring takes requests."""
    control, chance = Control(target), random.Random(2)
    layers = control.describe().layers
    while True:
        with suppress(OSError, grpc.RpcError), attached(control) as ring:
            while ring.is_open():
                for _ in range(REQUESTS // 4):
                    layer = chance.randrange(len(layers))
                    cell = chance.randrange(layers[layer].cells)
                    ring.put(ACQUIRE, CELLS, layer, [cell])
                    ring.put(RELEASE, CELLS, layer, [cell])
                    ring.put(PREFETCH, RANGES, layer, [cell, min(cell + STEP, layers[layer].cells)])
                    ring.read_grants()
                while ring.word(REQUEST_HEAD) != ring.tail & 0xFFFFFFFF and ring.is_open():
                    time.sleep(AGAIN_S / 100)
        time.sleep(AGAIN_S)


def lease_hoarder(target: Target) -> None:
    """Acquires as many cells as it may borrow, and releases none."""
    control = Control(target)
    layers = control.describe().layers
    while True:
        with suppress(OSError, grpc.RpcError), attached(control, slots=0) as ring:
            begin = 0  # cells of all layers, one after the other
            while ring.is_open():
                ring.read_grants()
                layer, cell = begin // STEP % len(layers), begin // STEP // len(layers) * STEP % layers[0].cells
                ring.put(ACQUIRE, RANGES, layer, [cell, min(cell + STEP, layers[layer].cells)])
                begin += STEP
                time.sleep(4 * AGAIN_S)
        time.sleep(AGAIN_S)


def ring_junk(target: Target) -> None:
    """Writes random bytes into the memory that it shares with the daemon, and rings the doorbell."""
    control, chance = Control(target), random.Random(3)
    while True:
        with suppress(OSError, ValueError, grpc.RpcError), attached(control) as ring:
            while ring.is_open():
                for _ in range(chance.randrange(1, 8)):
                    at = chance.choice((chance.randrange(64, 256), chance.randrange(REQUESTS_OFFSET, 1 << 15)))
                    junk = chance.choice((chance.randbytes(4), struct.pack("<I", chance.randrange(80))))
                    ring.map[at : at + 4] = junk
                os.write(ring.doorbell, struct.pack("<Q", 1))
                time.sleep(AGAIN_S / 10)
        time.sleep(AGAIN_S)


def allow_many_descriptors() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
