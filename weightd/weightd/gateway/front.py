"""The front: the proxy that all clients connect to. It passes on to gRPC what is within bounds.

The front learns from the kernel or from TLS who connects, and terminates TLS. It counts what each user holds
(users.py), reads the frame headers of both directions (http2.py), and closes connections that stay half open. gRPC
listens at a socket whose name has been removed, so that only this process, which has a descriptor of it, can connect.
The front binds each of its connections to gRPC to an abstract name, by which a call's handler finds the call's
CallOrigin.

A connection buffers at most one read. While the other side does not take it, this side is not read.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from weightd.gateway.http2 import CALL_COST, PREFACE, ClientFrames, ProtocolError, ServerFrames
from weightd.gateway.users import (
    CONNECTIONS_MAX,
    CONNECTIONS_OF_USER,
    STREAMS_MAX,
    STREAMS_OF_USER,
    Totals,
    User,
    host_name,
)

logger = logging.getLogger(__name__)

READ_BYTES = 256 << 10
READS_AT_ONCE = 8  # reads of one connection's answers before other connections have their turn
TLS_RECORD_BYTES = 16 << 10
ACCEPTS = 16  # connections accepted in one turn of the loop
SWEEP_S = 1.0  # interval of the checks for what is late
HALF_OPEN_S = 10.0  # the most time that a connection's beginning, a frame or a header block may take
MESSAGE_S = 60.0  # the most time from a message's beginning to its end
UNREAD_S = 60.0  # how long a client may leave answers unread
UNREAD_BYTES_MAX = 16 << 20  # unread answers of all connections; above it, those that wait longest are closed
CONNECTION_COST, HANDSHAKE_COST = 10, 50  # cost of a connection and of a TLS handshake, in frames
EARNED_PER_DATA_FRAME = 2  # credit in frames: a client answers the data that it reads with window updates
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError, InterruptedError)


@dataclass(frozen=True)
class CallOrigin:
    """Where a call comes from: only what the kernel or TLS has proven."""

    peer: str  # the user whose calls are counted together: a user id, a certificate's names, or a host
    local: bool  # over a Unix socket
    tls_names: frozenset[str]
    hang_up: Callable[[], None]
    charge: Callable[[float], None]  # adds a cost, in frames, to the user's; reading pauses while that is too high


@dataclass(frozen=True)
class Listener:
    """A socket that listens."""

    socket: socket.socket
    tls: Callable[[], ssl.SSLContext] | None
    tls_names: Callable[[bytes], frozenset[str]] = lambda _: frozenset()  # of a certificate in DER form


class Front:
    """Holds the connections of all listeners, from start() to close(). Belongs to one event loop."""

    def __init__(self, inner_fd: int, message_bytes_max: int) -> None:
        """`inner_fd`: an O_PATH descriptor of the socket at which gRPC listens."""
        self.inner_path = f"/proc/self/fd/{inner_fd}"
        self.message_bytes_max = message_bytes_max
        self.buffer = memoryview(bytearray(READ_BYTES))  # shared: each read is passed on at once, or copied
        self.origins: dict[str, CallOrigin] = {}
        self.totals = Totals()
        self.users: dict[str, User] = {}
        self._listeners: list[Listener] = []
        self._pausing: list[Listener] = []  # not accepting until the next sweep
        self._connections: dict[FrontConnection, None] = {}  # in order of age, oldest first
        self._sweeper: asyncio.Task[None] | None = None

    def start(self, listeners: list[Listener]) -> None:
        """Begins to accept connections."""
        self._listeners = listeners
        loop = asyncio.get_running_loop()
        for listener in listeners:
            loop.add_reader(listener.socket.fileno(), self._accept, listener)
        self._sweeper = asyncio.create_task(self._sweep())

    def stop_accepting(self) -> None:
        loop = asyncio.get_running_loop()
        self._pausing = []
        for listener in self._listeners:
            loop.remove_reader(listener.socket.fileno())
            listener.socket.close()
        self._listeners = []

    def close(self) -> None:
        """Closes all connections."""
        self.stop_accepting()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self._connections):
            connection.close("weightd ends")

    def belong(self, connection: FrontConnection, name: str) -> bool:
        """Counts a connection as that user's. Above a bound it closes the oldest idle one; False if there is none."""
        self._leave(connection)
        user = connection.user = self.users.setdefault(name, User(name, self.totals))
        user.connections += 1
        self.totals.connections += 1
        if user.connections > CONNECTIONS_OF_USER:
            return self._drop_one(user, connection)
        if self.totals.connections > CONNECTIONS_MAX:
            return self._drop_one(max(self.users.values(), key=lambda each: each.connections), connection)
        return True

    def bound_streams(self, user: User) -> None:
        """While this user, or all users, have too many calls: closes the connection with the most calls."""
        while user.streams > STREAMS_OF_USER or self.totals.streams > STREAMS_MAX:
            most = user if user.streams > STREAMS_OF_USER else max(self.users.values(), key=lambda each: each.streams)
            theirs = [one for one in self._connections if one.user is most]
            max(theirs, key=lambda one: one.streams).close(f"too many calls of {most.name}")

    def forget(self, connection: FrontConnection) -> None:
        self._connections.pop(connection, None)
        self._leave(connection)

    def _leave(self, connection: FrontConnection) -> None:
        if connection.user is not None:
            connection.user.connections -= 1
            self.totals.connections -= 1
            connection.user = None

    def _drop_one(self, user: User, newcomer: FrontConnection) -> bool:
        """Closes an idle connection of `user`, or any if the newcomer belongs to another user."""
        theirs = [one for one in self._connections if one.user is user and one is not newcomer]
        idle = next((one for one in theirs if not one.streams), None)
        dropped = theirs[0] if idle is None and user is not newcomer.user else idle
        if dropped is not None:
            dropped.close(f"too many connections of {user.name}")
        return dropped is not None

    def _accept(self, listener: Listener) -> None:
        for _ in range(ACCEPTS):
            try:
                outer, address = listener.socket.accept()
            except BlockingIOError:  # no more connections wait
                return
            except ConnectionAbortedError:  # the client has closed it already
                continue
            except OSError as error:  # no descriptors or memory left; without a pause the loop would spin
                logger.warning("no connection can be accepted: %s", error.strerror)
                asyncio.get_running_loop().remove_reader(listener.socket.fileno())
                self._pausing.append(listener)
                return
            outer.setblocking(False)
            connection = FrontConnection(self, outer, listener)
            self._connections[connection] = None
            connection.begin(address)

    def _accept_again(self) -> None:
        pausing, self._pausing = self._pausing, []
        for listener in pausing:
            asyncio.get_running_loop().add_reader(listener.socket.fileno(), self._accept, listener)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._accept_again()
            now_s, unread_bytes = time.monotonic(), 0
            for user in [user for user in self.users.values() if not user.connections and user.is_square()]:
                del self.users[user.name]
            for connection in list(self._connections):
                connection.look_at(now_s)
                unread_bytes += connection.unread_bytes
            unread = sorted((one for one in self._connections if one.unread_bytes), key=lambda one: one.unread_since_s)
            for connection in unread:
                if unread_bytes <= UNREAD_BYTES_MAX:
                    break
                unread_bytes -= connection.unread_bytes
                connection.close("too many answers wait to be read")


class FrontConnection:
    """A client's connection, and the front's connection to gRPC that belongs to it."""

    def __init__(self, front: Front, outer: socket.socket, listener: Listener) -> None:
        self._front = front
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._outer: socket.socket = outer
        self._outer_fd = outer.fileno()
        self._inner: socket.socket | None = None
        self._name = ""
        self._local = outer.family == socket.AF_UNIX
        self._tls_names: frozenset[str] = frozenset()
        self._preface = b""
        self._frames: ClientFrames | None = None
        self._answers = ServerFrames(self._end_stream)
        self._to_inner = b""
        self._to_outer = b""
        self._began_s = self.unread_since_s = time.monotonic()
        self._paused: asyncio.TimerHandle | None = None
        self._reading = False
        self._closed = False
        self.user: User | None = None

    @property
    def streams(self) -> int:
        return 0 if self._frames is None else self._frames.streams

    @property
    def unread_bytes(self) -> int:
        return len(self._to_outer)

    def begin(self, address: object) -> None:
        """Finds out who connects. With TLS, the certificate may tell more after the handshake."""
        if self._local:
            _, user_id, _ = struct.unpack("iII", self._outer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            name = f"user {user_id}"
        else:
            assert isinstance(address, tuple)
            name = host_name(address[0])
            self._outer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self._belong_to(name):
            return
        if self._listener.tls is None:
            self._pay(CONNECTION_COST)
            return
        try:
            self._outer = self._listener.tls().wrap_socket(self._outer, True, do_handshake_on_connect=False)
        except (OSError, ValueError) as error:
            self.close(f"TLS: {error}")
            return
        self._pay(HANDSHAKE_COST)

    def close(self, reason: str) -> None:
        if self._closed:
            return
        self._closed = True
        logger.debug("closed the connection of %s: %s", self.user.name if self.user else "a client", reason)
        if self._paused is not None:
            self._paused.cancel()
        for each in filter(None, (self._outer, self._inner)):
            if (descriptor := each.fileno()) >= 0:
                self._loop.remove_reader(descriptor)
                self._loop.remove_writer(descriptor)
            each.close()
        if self._frames is not None:
            self._frames.end_all()
        self._front.origins.pop(self._name, None)
        self._front.forget(self)

    def look_at(self, now_s: float) -> None:
        """Closes the connection if something has been half open for too long."""
        if self._frames is None:
            if now_s - self._began_s > HALF_OPEN_S:
                self.close("it has not sent the beginning of a connection in time")
            return
        frame_s, message_s = self._frames.half_sent_s(now_s)
        if frame_s > HALF_OPEN_S or message_s > MESSAGE_S:
            self.close("it has not completed a frame or message in time")
        elif self._to_outer and now_s - self.unread_since_s > UNREAD_S:
            self.close("it does not read its answers")

    def _belong_to(self, name: str) -> bool:
        if not self._front.belong(self, name):
            self.close(f"too many connections of {name}")
        return not self._closed

    def _end_stream(self, stream: int) -> None:
        if self._frames is not None:
            self._frames.end_stream(stream)

    # From the client to gRPC.

    def _start_reading(self) -> None:
        if self._closed or self._reading or self._paused or self._to_inner:
            return
        self._reading = True
        shaking = isinstance(self._outer, ssl.SSLSocket) and self._outer.version() is None
        self._loop.add_reader(self._outer_fd, self._shake_hands if shaking else self._read_outer)
        if isinstance(self._outer, ssl.SSLSocket) and not shaking and self._outer.pending():
            self._loop.call_soon(self._read_outer)  # bytes in TLS's own buffer raise no event

    def _stop_reading(self) -> None:
        self._reading = False
        self._loop.remove_reader(self._outer_fd)

    def _pay(self, cost: float) -> None:
        """Adds `cost` to the user's and reads on, after a pause if the user has sent too much."""
        assert self.user is not None
        if cost and (pause_s := self.user.pause_s(cost)):
            self._stop_reading()
            self._paused = self._loop.call_later(pause_s, self._end_pause)
        self._start_reading()

    def _charge(self, cost: float) -> None:
        if not self._closed:
            self._pay(cost)

    def _end_pause(self) -> None:
        self._paused = None
        self._start_reading()

    def _shake_hands(self) -> None:
        assert isinstance(self._outer, ssl.SSLSocket)
        if self._closed:
            return
        try:
            self._outer.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLWantWriteError:
            return  # the handshake's answer is small, so the client must read first
        except (OSError, ValueError) as error:
            self.close(f"TLS: {error}")
            return
        if self._outer.selected_alpn_protocol() != "h2":
            self.close("TLS: it does not speak HTTP/2")
            return
        certificate = self._outer.getpeercert(binary_form=True)
        self._tls_names = self._listener.tls_names(certificate) if certificate else frozenset()
        # From now on it counts as the certificate's user instead of the address's.
        if self._tls_names and not self._belong_to(f"tls:{', '.join(sorted(self._tls_names))}"):
            return
        self._stop_reading()
        self._start_reading()
        self._read_outer()

    def _read_outer(self) -> None:
        if self._closed or self._to_inner or self._paused:
            return
        try:
            size = self._outer.recv_into(self._front.buffer)
        except WOULD_BLOCK:
            return
        except OSError as error:
            self.close(str(error))
            return
        if not size:
            self.close("it ended")
            return
        try:
            self._take(self._front.buffer[:size])
        except ProtocolError as error:
            self.close(str(error))
            return
        if isinstance(self._outer, ssl.SSLSocket) and not self._closed and self._outer.pending():
            self._loop.call_soon(self._read_outer)

    def _take(self, data: memoryview) -> None:
        assert self.user is not None
        if self._frames is None:
            missing = len(PREFACE) - len(self._preface)
            self._preface += data[:missing]
            if not PREFACE.startswith(self._preface):
                raise ProtocolError("it does not speak HTTP/2")
            if len(self._preface) < len(PREFACE):
                return
            self._frames = ClientFrames(self.user, self._front.message_bytes_max)
            self._to_inner = self._preface
            data = data[missing:]
        self._frames.feed(data)
        cost, self._frames.cost = self._frames.cost, 0.0
        if cost >= CALL_COST:
            self._front.bound_streams(self.user)
            if self._closed:
                return
        if self._to_inner:
            self._to_inner += data
            self._stop_reading()
            self._connect()
        else:
            self._send_inner(data)
        if not self._closed:
            self._pay(cost)

    def _connect(self) -> None:
        """Connects to gRPC, once the client has sent HTTP/2's preface."""
        assert self.user is not None
        self._name = f"weightd-{secrets.token_hex(8)}"
        self._front.origins[self._name] = CallOrigin(
            self.user.name, self._local, self._tls_names, lambda: self.close("it has not read an answer"), self._charge
        )
        self._inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._inner.bind(f"\0{self._name}")
        self._try_to_connect()

    def _try_to_connect(self) -> None:
        if self._closed or self._inner is None:
            return
        try:
            self._inner.connect(self._front.inner_path)
        except BlockingIOError:  # gRPC's queue of connections is full
            self._loop.call_later(0.01, self._try_to_connect)
            return
        except OSError as error:
            self.close(f"gRPC: {error}")
            return
        self._loop.add_reader(self._inner.fileno(), self._read_inner)
        self._flush_inner()

    def _send_inner(self, data: memoryview) -> None:
        assert self._inner is not None
        try:
            sent = self._inner.send(data)
        except WOULD_BLOCK:
            sent = 0
        except OSError as error:
            self.close(f"gRPC: {error}")
            return
        if sent < len(data):
            self._to_inner = bytes(data[sent:])
            self._stop_reading()
            self._loop.add_writer(self._inner.fileno(), self._flush_inner)

    def _flush_inner(self) -> None:
        if self._closed or self._inner is None:
            return
        data, self._to_inner = self._to_inner, b""
        self._loop.remove_writer(self._inner.fileno())
        self._send_inner(memoryview(data))
        self._start_reading()

    # From gRPC to the client.

    def _read_inner(self) -> None:
        for _ in range(READS_AT_ONCE):
            if self._closed or self._to_outer or self._inner is None:
                return
            try:
                size = self._inner.recv_into(self._front.buffer)
            except WOULD_BLOCK:
                return
            except OSError as error:
                self.close(f"gRPC: {error}")
                return
            if not size:
                self.close("gRPC has ended it")
                return
            self._answer(self._front.buffer[:size])

    def _answer(self, data: memoryview) -> None:
        self._answers.feed(data)
        if self._answers.data_frames and self.user is not None:
            self.user.pause_s(-EARNED_PER_DATA_FRAME * self._answers.data_frames)
            self._answers.data_frames = 0
        self._send_outer(data)

    def _send_outer(self, data: memoryview) -> None:
        assert self._inner is not None
        sent = 0
        step = TLS_RECORD_BYTES if isinstance(self._outer, ssl.SSLSocket) else len(data)
        try:
            while sent < len(data):
                sent += self._outer.send(data[sent : sent + step])
        except WOULD_BLOCK:
            pass
        except OSError as error:
            self.close(str(error))
            return
        if sent:
            self.unread_since_s = time.monotonic()
        if sent < len(data):  # TLS must send the same record again; what is left begins with it
            self._to_outer = bytes(data[sent:])
            self._loop.remove_reader(self._inner.fileno())
            self._loop.add_writer(self._outer_fd, self._flush_outer)

    def _flush_outer(self) -> None:
        if self._closed or self._inner is None:
            return
        data, self._to_outer = self._to_outer, b""
        self._loop.remove_writer(self._outer_fd)
        self._send_outer(memoryview(data))
        if not self._closed and not self._to_outer:
            self._loop.add_reader(self._inner.fileno(), self._read_inner)
