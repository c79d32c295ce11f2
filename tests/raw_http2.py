"""HTTP/2 by hand, for clients that misbehave: frames as bytes, and a connection that sends them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from types import TracebackType

from weightd.call_bounds import SERVICE_NAME

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = *range(5), *range(6, 10)
END_STREAM, ACK, END_HEADERS = 1, 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header that leaves the tables as they are; both shorter than 127 bytes."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def call_headers(method: str) -> bytes:
    fields = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": f"/{SERVICE_NAME}/{method}".encode(),
        b":authority": b"localhost",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
    }
    return b"".join(literal(name, value) for name, value in fields.items())


def call(method: str, stream: int, message: bytes = b"", size: int | None = None) -> bytes:
    """A whole call; one that is half sent, where `size` says that more of the message comes."""
    prefixed = b"\0" + struct.pack(">I", len(message) if size is None else size) + message
    ends = END_STREAM if size is None else 0
    return frame(HEADERS, END_HEADERS, stream, call_headers(method)) + frame(DATA, ends, stream, prefixed)


class RawClient:
    """A connection to a Unix socket or a host and port; it has begun as HTTP/2 does, and acknowledges nothing."""

    def __init__(self, address: str, begins: bytes = PREFACE + frame(SETTINGS, 0, 0)) -> None:
        host, _, port = address.rpartition(":")
        if host == "unix":
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(port)
        else:
            self.socket = socket.create_connection((host, int(port)))
        self.socket.settimeout(60)
        self.socket.sendall(begins)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Kind, flags, stream and payload of what comes, until the connection ends."""
        while len(header := self._exactly(9)) == 9:
            size = int.from_bytes(header[:3])
            yield header[3], header[4], int.from_bytes(header[5:]), self._exactly(size)

    def await_end(self) -> None:
        """Raises TimeoutError when the other end keeps the connection."""
        for _ in self.frames():
            pass

    def _exactly(self, size: int) -> bytes:
        """Less only at the end."""
        received = b""
        try:
            while len(received) < size and (part := self.socket.recv(size - len(received))):
                received += part
        except (ConnectionResetError, BrokenPipeError):
            return b""
        return received
