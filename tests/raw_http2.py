"""Calls in HTTP/2 by hand, for clients that misbehave, and a connection that sends them and reads what comes."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from types import TracebackType

from hostile_frames import DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, SETTINGS, call_headers, frame


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
