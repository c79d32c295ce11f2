"""Bounds of an HTTP/2 connection that are checked before gRPC sees its bytes. Only frame headers are read.

gRPC's core bounds a call, but not what arrives before there is a call: header blocks without an end, frames that must
be answered at once, parts of messages. So this module counts them first. It does not decode header blocks, so it does
not know which method a call names.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEADER_BYTES = 9
DATA, HEADERS, RST_STREAM, PUSH_PROMISE, CONTINUATION = 0, 1, 3, 5, 9
END_STREAM, END_HEADERS = 1, 4
MESSAGE_PREFIX_BYTES = 5  # gRPC's: a flag for compression, and the message's length
TOO_LONG = b"\xff\xff\xff\xff"  # a length that gRPC refuses with RESOURCE_EXHAUSTED

HEADER_BLOCK_BYTES_MAX = 16 << 10  # compressed; gRPC bounds the decompressed size
CONTINUATIONS_MAX = 8
CONTROL_BYTES_MAX = 1 << 10  # of a frame that is neither data nor headers; the longest useful one is settings
SMALL_BYTES = 16 << 10  # messages up to this size reserve nothing; data of this size costs as much as one frame
CALL_COST = 10  # in frames: the work of gRPC and Python for a call


class ProtocolError(Exception):
    """The client breaks a bound that no honest client reaches; the connection is closed."""


class FrameAccount(Protocol):
    """Counts what the user of a connection holds."""

    def open_stream(self) -> None: ...
    def close_stream(self) -> None: ...
    def reserve(self, size_bytes: int) -> bool:
        """Whether the user may hold `size_bytes` more; if so, they are counted."""

    def give_back(self, size_bytes: int) -> None: ...


class _Stream:
    """A call, and how much of its current message has arrived."""

    __slots__ = ("left_bytes", "prefix", "refused", "reserved_bytes")

    def __init__(self) -> None:
        self.prefix = b""
        self.left_bytes = 0  # of the current message
        self.reserved_bytes = 0  # of the longest message so far, which gRPC may still hold
        self.refused = False


class ClientFrames:
    """The frames that one client sends after HTTP/2's preface."""

    def __init__(self, account: FrameAccount, message_bytes_max: int) -> None:
        """`message_bytes_max`: gRPC itself refuses longer messages."""
        self._account = account
        self._message_bytes_max = message_bytes_max
        self._streams: dict[int, _Stream] = {}
        self._newest = 0
        self._head = b""  # the part of a frame's header that has arrived
        self._left_bytes = 0  # of the current frame
        self._data_of: _Stream | None = None
        self._data_id = 0
        self._in_data = False
        self._block_of = 0  # the stream whose header block has no end yet
        self._block_bytes = self._continuations = 0
        self._frame_since_s = 0.0
        self._incomplete: dict[int, float] = {}  # when the incomplete message of a stream began; oldest first
        self.cost = 0.0  # of what has arrived, in frames

    @property
    def streams(self) -> int:
        """Calls that are open."""
        return len(self._streams)

    def feed(self, data: memoryview) -> None:
        """Takes the next bytes. If a message has no room, its length is overwritten so that gRPC refuses it.

        Raises ProtocolError.
        """
        at, end = 0, len(data)
        while at < end:
            if not self._left_bytes:
                taken = min(FRAME_HEADER_BYTES - len(self._head), end - at)
                self._head += data[at : at + taken]
                at += taken
                if len(self._head) == FRAME_HEADER_BYTES:
                    self._begin_frame()
                continue
            taken = min(self._left_bytes, end - at)
            if self._in_data and self._data_of is not None and not self._data_of.refused:
                self._read_messages(self._data_of, data[at : at + taken])
            self._left_bytes -= taken
            at += taken
        if not self._frame_since_s and (self._head or self._block_of or (self._left_bytes and not self._in_data)):
            self._frame_since_s = time.monotonic()
        elif not (self._head or self._block_of or self._left_bytes):
            self._frame_since_s = 0.0

    def half_sent_s(self, now_s: float) -> tuple[float, float]:
        """For how many seconds a frame or header block, and a message, have been incomplete."""
        message_since_s = next(iter(self._incomplete.values()), now_s)
        return now_s - (self._frame_since_s or now_s), now_s - message_since_s

    def end_stream(self, stream: int) -> None:
        """One of the two sides has ended the call."""
        if (ended := self._streams.pop(stream, None)) is not None:
            self._incomplete.pop(stream, None)
            self._account.close_stream()
            self._account.give_back(ended.reserved_bytes)
            ended.refused = True  # bytes that still arrive are not counted

    def end_all(self) -> None:
        for stream in list(self._streams):
            self.end_stream(stream)

    def _begin_frame(self) -> None:
        head, self._head = self._head, b""
        size, kind, flags = int.from_bytes(head[:3]), head[3], head[4]
        stream = int.from_bytes(head[5:]) & 0x7FFFFFFF
        self._left_bytes, self._in_data = size, kind == DATA
        self.cost += size / SMALL_BYTES if kind == DATA and size >= CONTROL_BYTES_MAX else 1
        if self._block_of and (kind != CONTINUATION or stream != self._block_of):
            raise ProtocolError("a frame within a header block")
        if kind == DATA:
            if flags & ~END_STREAM:
                raise ProtocolError("padded data")
            self._data_of, self._data_id = self._streams.get(stream), stream
        elif kind in (HEADERS, CONTINUATION):
            self._begin_block(kind, flags, stream, size)
        elif kind == PUSH_PROMISE or size > CONTROL_BYTES_MAX:
            raise ProtocolError(f"a frame of type {kind} and {size} bytes")
        elif kind == RST_STREAM:
            self.end_stream(stream)

    def _begin_block(self, kind: int, flags: int, stream: int, size: int) -> None:
        if kind == HEADERS:
            self._block_bytes = self._continuations = 0
            if stream > self._newest:
                self._newest = stream
                self.cost += CALL_COST
                self._account.open_stream()
                self._streams[stream] = _Stream()
        elif not self._block_of:
            raise ProtocolError("a header block without a beginning")
        else:
            self._continuations += 1
        self._block_bytes += size
        self._block_of = 0 if flags & END_HEADERS else stream
        if self._block_bytes > HEADER_BLOCK_BYTES_MAX or self._continuations > CONTINUATIONS_MAX:
            raise ProtocolError("a header block too long")

    def _read_messages(self, stream: _Stream, data: memoryview) -> None:
        at, end = 0, len(data)
        while at < end and not stream.refused:
            if stream.left_bytes:
                taken = min(stream.left_bytes, end - at)
                stream.left_bytes -= taken
            else:
                taken = min(MESSAGE_PREFIX_BYTES - len(stream.prefix), end - at)
                stream.prefix += data[at : at + taken]
                if len(stream.prefix) == MESSAGE_PREFIX_BYTES:
                    self._begin_message(stream, data[at : at + taken])
            at += taken
        if stream.left_bytes or stream.prefix:
            self._incomplete.setdefault(self._data_id, time.monotonic())
        else:
            self._incomplete.pop(self._data_id, None)

    def _begin_message(self, stream: _Stream, prefix: memoryview) -> None:
        """`prefix` is the part of the message's prefix that has not been passed on yet."""
        size, stream.prefix = int.from_bytes(stream.prefix[1:]), b""
        stream.left_bytes = size
        if size > self._message_bytes_max:
            stream.refused, stream.left_bytes = True, 0
        elif size > max(SMALL_BYTES, stream.reserved_bytes):
            if self._account.reserve(size - stream.reserved_bytes):
                stream.reserved_bytes = size
            elif len(prefix) == MESSAGE_PREFIX_BYTES:
                prefix[1:] = TOO_LONG
                stream.refused, stream.left_bytes = True, 0
            else:  # a part of the length has been passed on and cannot be overwritten
                raise ProtocolError("no room for a message")


class ServerFrames:
    """The frames that gRPC sends: finds out where calls end."""

    def __init__(self, ended: Callable[[int], None]) -> None:
        self._ended = ended
        self._head = b""
        self._left_bytes = 0
        self.data_frames = 0

    def feed(self, data: memoryview) -> None:
        at, end = 0, len(data)
        while at < end:
            if self._left_bytes:
                taken = min(self._left_bytes, end - at)
                self._left_bytes -= taken
                at += taken
                continue
            if not self._head and end - at >= FRAME_HEADER_BYTES:
                head = bytes(data[at : at + FRAME_HEADER_BYTES])
                at += FRAME_HEADER_BYTES
            else:
                taken = min(FRAME_HEADER_BYTES - len(self._head), end - at)
                self._head += data[at : at + taken]
                at += taken
                if len(self._head) < FRAME_HEADER_BYTES:
                    return
                head, self._head = self._head, b""
            self._left_bytes = int.from_bytes(head[:3])
            self.data_frames += head[3] == DATA
            if head[3] == RST_STREAM or (head[3] in (DATA, HEADERS) and head[4] & END_STREAM):
                self._ended(int.from_bytes(head[5:]) & 0x7FFFFFFF)
