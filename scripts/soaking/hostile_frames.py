"""Clients that misbehave in HTTP/2 and below, written from RFC 9113 alone. Each goes on until it is killed.

They never get as far as a whole message, so weightd learns of most of them through what gRPC's core holds.
"""

from __future__ import annotations

import base64
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from weightd_proto import weightd_pb2 as pb

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, CONTINUATION = 0, 1, 2, 3, 4, 6, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
PING_FRAME = b"\0\0\x08\x06\0\0\0\0\0"
STREAMS = 64  # of one connection, as many as weightd allows
CONNECTIONS = 5  # 5 x 64 are more calls than it runs at once
IDLE_CONNECTIONS = 1024
PROMISED_BYTES = 1_000_000  # of a message that is never completed
POLL_S = 0.3
AGAIN_S = 0.01  # after a refusal


@dataclass(frozen=True)
class Target:
    """A weightd: the path of its gRPC socket, its port on loopback TCP, and a model."""

    path: str
    port: int
    model: str

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        return connection

    def connect_tcp(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def identity(self) -> bytes:
        """The identity that weightd gives this process, to be sent with calls."""
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(10)
            peer.connect(self.path + ".peer")
            return peer.recv(8192)


Connect = Callable[[], socket.socket]


def frame(kind: int, flags: int, stream: int, load: bytes = b"") -> bytes:
    return struct.pack(">I", len(load))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + load


def literal(name: bytes, value: bytes) -> bytes:
    """A header field of HPACK (RFC 7541, 6.2.2), not indexed."""
    return b"\x00" + _length(len(name)) + name + _length(len(value)) + value


def _length(count: int) -> bytes:
    """An integer with a prefix of 7 bits (RFC 7541, 5.1)."""
    if count < 127:
        return bytes([count])
    rest, coded = count - 127, b"\x7f"
    while rest >= 128:
        coded, rest = coded + bytes([rest % 128 + 128]), rest // 128
    return coded + bytes([rest])


def call_headers(method: str, identity: bytes = b"") -> bytes:
    fields = {
        ":method": "POST", ":scheme": "http", ":path": f"/weightd.v1.Weightd/{method}", ":authority": "localhost",
        "te": "trailers", "content-type": "application/grpc",
    }  # fmt: skip
    block = b"".join(literal(name.encode(), value.encode()) for name, value in fields.items())
    return block + (literal(b"weightd-identity-bin", base64.b64encode(identity)) if identity else b"")


def open_http2(connect: Connect) -> socket.socket:
    connection = connect()
    connection.sendall(PREFACE + frame(SETTINGS, 0, 0))
    return connection


def answer_pings(connection: socket.socket) -> None:
    """Answers like a healthy peer. Raises OSError if the other end has closed the connection."""
    connection.setblocking(False)
    with suppress(BlockingIOError):
        while data := connection.recv(1 << 20):
            at = data.find(PING_FRAME)
            if at >= 0:
                connection.send(frame(PING, ACK, 0, data[at + len(PING_FRAME) :][:8]))
        raise ConnectionResetError


def keep_open(opened: Callable[[], socket.socket], count: int) -> None:
    """Keeps `count` connections open for ever, each made by `opened`. A closed one is replaced."""
    held: list[socket.socket] = []
    while True:
        with suppress(OSError):
            while len(held) < count:
                held.append(opened())
        for connection in list(held):
            try:
                answer_pings(connection)
            except OSError:
                held.remove(connection)
                connection.close()
        time.sleep(POLL_S)


def half_sent_calls(target: Target) -> None:
    """Calls whose message is announced but never completed."""
    identity = target.identity()

    def opened() -> socket.socket:
        connection = open_http2(target.connect)
        for stream in range(1, 2 * STREAMS, 2):
            message = b"\0" + struct.pack(">I", PROMISED_BYTES) + b"\n" * 100
            head = frame(HEADERS, END_HEADERS, stream, call_headers("DescribeModel", identity))
            connection.sendall(head + frame(DATA, 0, stream, message))
        return connection

    keep_open(opened, CONNECTIONS)


def trickling_uploads(target: Target) -> None:
    """Uploads that send a byte now and then."""
    header = pb.PublishCalibrationHeader(model=target.model, calibration=pb.Calibration(mode="exact"))
    message = pb.PublishCalibrationRequest(header=header).SerializeToString()
    identity = target.identity()
    held: list[tuple[socket.socket, Iterator[int]]] = []
    while True:
        with suppress(OSError):
            while len(held) < CONNECTIONS:
                connection = open_http2(target.connect)
                head = frame(HEADERS, END_HEADERS, 1, call_headers("PublishCalibration", identity))
                connection.sendall(head + frame(DATA, 0, 1, b"\0" + struct.pack(">I", len(message))))
                held.append((connection, iter(message)))
        for one in list(held):
            connection, rest = one
            try:
                answer_pings(connection)
                connection.send(frame(DATA, 0, 1, bytes([next(rest)])))
            except (OSError, StopIteration):
                held.remove(one)
                connection.close()
        time.sleep(POLL_S)


def continuation_flood(target: Target, connect: Connect | None = None) -> None:
    """Headers that never end; gRPC's core would collect them."""
    field = literal(b"x", b"y" * 16_000)
    while True:
        with suppress(OSError):
            connection = open_http2(connect or target.connect)
            connection.sendall(frame(HEADERS, 0, 1, call_headers("Stats")))
            while True:
                connection.sendall(frame(CONTINUATION, 0, 1, field))
        time.sleep(AGAIN_S)


def continuation_flood_over_tcp(target: Target) -> None:
    """The same over TCP, where the kernel does not identify the client."""
    continuation_flood(target, target.connect_tcp)


def idle_connections(target: Target) -> None:
    """As many connections as weightd accepts, without a call."""
    keep_open(lambda: open_http2(target.connect), IDLE_CONNECTIONS)


def silent_connections_over_tcp(target: Target) -> None:
    """Connections that send nothing."""
    keep_open(target.connect_tcp, IDLE_CONNECTIONS)


def rapid_resets(target: Target) -> None:
    """Calls that are opened and cancelled at once (CVE-2023-44487)."""
    block = call_headers("Stats")
    while True:
        with suppress(OSError):
            connection = open_http2(target.connect)
            for stream in range(1, 1 << 20, 2):
                reset = frame(RST_STREAM, 0, stream, struct.pack(">I", 8))
                connection.sendall(frame(HEADERS, END_HEADERS, stream, block) + reset)
                if stream % 256 == 1:
                    answer_pings(connection)
                    connection.setblocking(True)
        time.sleep(AGAIN_S)


def junk_frames(target: Target) -> None:
    """Random bytes, with and without the valid beginning of a connection."""
    chance = random.Random(0)
    while True:
        with suppress(OSError):
            connection = open_http2(target.connect) if chance.random() < 0.5 else target.connect()
            for _ in range(chance.randrange(8)):
                kind, flags, stream = chance.randrange(12), chance.randrange(256), chance.randrange(1 << 31)
                connection.sendall(frame(kind, flags, stream, os.urandom(chance.randrange(1000))))
            connection.close()
        time.sleep(AGAIN_S)


def identities_without_end(target: Target) -> None:
    """Requests its identity again and again and never reads it."""
    held: list[socket.socket] = []
    while True:
        with suppress(OSError):
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(target.path + ".peer")
            held = [*held[-500:], peer]
        time.sleep(AGAIN_S / 10)
