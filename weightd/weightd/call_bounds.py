"""How many long calls run at once, so that no client shuts out another's control calls or grows the daemon.

A call named here stays as long as its client or the device likes: it has a bound of its own, well below CALLS_MAX, of
which one peer gets a part, and so do those who want one model. A peer is a user, where a client shows who it is, else
the host; those of a Unix socket who show nothing are one peer. All other calls end by themselves.

A call keeps its place until all that it began has ended (keeping_place), so threads that wait for a device are bounded,
too: there are as many as there are places.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from weightd.fetch import REQUEST_BYTES_MAX
from weightd_proto import weightd_pb2

SERVICE_NAME = weightd_pb2.DESCRIPTOR.services_by_name["Weightd"].full_name

CALLS_MAX = 256  # at once, of all kinds; gRPC itself refuses the next
FETCHES_MAX = 12  # each may hold about 6 MiB, in our hands and in gRPC's: 72 of the interpreter's 150
OPENS_MAX = 32  # reading resident weights may take minutes
PUBLISHES_MAX = 4
LOOKS_MAX = 32  # into the catalog: short, unless its device hangs
CONNECTIONS_MAX = 1024  # to one address: four for each session there can be; each takes 20 KiB of us, and a descriptor
STREAMS_MAX = 64  # of one connection; a client has a few, and several may share one through a proxy
METADATA_BYTES_MAX = 16 << 10  # an identity of 256 groups has at most 1.4 KiB
RECORD_BYTES_MAX = 16 << 20  # a model's record, the largest answer; the client takes as much

# A peer that is frozen, or cut off by a network that drops its packets, is found out within 50 s, so that what its
# calls hold comes free. A living one may ping us as often as our clients do (each 20 s) and a little more often.
KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 20_000
PING_INTERVAL_MIN_MS = 10_000
PATIENCE_S = 60.0  # with a living caller, for its next piece of an upload, or until it takes an answer
# A stream that nobody reads is over for us after PATIENCE_S, but gRPC keeps its last message (1 MiB) until somebody
# does, or its connection ends. So connections end: politely, with time for the calls that run. The longest of our
# clients' calls, an OpenSession that reads resident weights, gives up after 10 minutes.
CONNECTION_IDLE_MS = 300_000  # without a call; gRPC's clients connect again when they need to
CONNECTION_AGE_MS = 600_000
CONNECTION_AGE_GRACE_MS = 1_200_000
HANDSHAKE_WITHIN_MS = 10_000  # of TLS: whoever connects and says nothing is dropped

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.so_reuseport", 0),  # else two daemons could share a TCP port, each getting some of the calls
    ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
    ("grpc.max_send_message_length", RECORD_BYTES_MAX),
    ("grpc.max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.max_concurrent_streams", STREAMS_MAX),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MIN_MS),
    ("grpc.http2.max_pings_without_data", 0),  # ours may go on for as long as nothing is said
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_WITHIN_MS),
    ("grpc.max_allowed_incoming_connections", CONNECTIONS_MAX),
    ("grpc.max_connection_idle_ms", CONNECTION_IDLE_MS),
    ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
    ("grpc.max_connection_age_grace_ms", CONNECTION_AGE_GRACE_MS),
]


@dataclass(frozen=True)
class Bound:
    """Of one method: calls at once, and of those, calls of one peer and calls that want one model."""

    calls: int
    of_peer: int
    of_model: int | None = None


BOUNDS = {
    f"/{SERVICE_NAME}/Fetch": Bound(FETCHES_MAX, FETCHES_MAX // 2, FETCHES_MAX * 2 // 3),
    f"/{SERVICE_NAME}/OpenSession": Bound(OPENS_MAX, OPENS_MAX // 2, OPENS_MAX * 3 // 4),
    f"/{SERVICE_NAME}/PublishCalibration": Bound(PUBLISHES_MAX, PUBLISHES_MAX),
    f"/{SERVICE_NAME}/ListModels": Bound(LOOKS_MAX // 2, LOOKS_MAX // 4),
    f"/{SERVICE_NAME}/DescribeModel": Bound(LOOKS_MAX // 2, LOOKS_MAX // 4, LOOKS_MAX * 3 // 8),
    "/grpc.health.v1.Health/Watch": Bound(16, 16),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Bound(8, 8),
}
assert 2 * sum(bound.calls for bound in BOUNDS.values()) <= CALLS_MAX

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any  # grpc.RpcMethodHandler is not generic at run time, only in its types


class Place:
    """A call's among those that BOUNDS allows, until it and all that it began have ended."""

    def __init__(self, running: Counter[tuple[str, str]], rows: list[tuple[str, str]]) -> None:
        """Counts itself in `rows` of `running`."""
        self._running = running
        self._rows = rows
        self._held = 1
        running.update(rows)

    def hold(self) -> None:
        """For what the call began; each asks for one release()."""
        self._held += 1

    def release(self) -> None:
        self._held -= 1
        if not self._held:
            self._leave(self._rows)

    def count_only_of_peer(self) -> None:
        """From now on others may have its place, but not the same peer."""
        self._leave([row for row in self._rows if row[0] != OF_PEER])
        self._rows = [row for row in self._rows if row[0] == OF_PEER]

    def _leave(self, rows: list[tuple[str, str]]) -> None:
        self._running.subtract(rows)
        for row in rows:
            if not self._running[row]:
                del self._running[row]


OF_ALL, OF_PEER, OF_MODEL = "all", "peer", "model"
_place: ContextVar[Place | None] = ContextVar("place", default=None)


def keeping_place() -> Callable[[], None]:
    """Keeps the place of the call that runs, until what this returns is called, on the event loop."""
    place = _place.get()
    if place is None:
        return lambda: None
    place.hold()
    return place.release


class CallBounds(grpc.aio.ServerInterceptor):
    """Refuses calls beyond BOUNDS with ABORTED: the caller asks again a little later.

    Ends with DEADLINE_EXCEEDED uploads whose caller sends nothing for `patience_s`, and streams of which it takes
    nothing for as long. What such a stream held is free then; the status is there for whoever reads on. Until somebody
    does, or the connection ends, it counts against its peer.
    """

    def __init__(self, peer_of: Callable[[Context], str] | None = None, patience_s: float = PATIENCE_S) -> None:
        """`peer_of`: who calls; by default the host."""
        self._peer_of = peer_of or (lambda context: host_of(context.peer()))
        self._patience_s = patience_s
        self._running: Counter[tuple[str, str]] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method not in BOUNDS:
            return handler
        serializers = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._one(method, handler.unary_unary), *serializers)
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(self._upload(method, handler.stream_unary), *serializers)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._many(method, handler.unary_stream), *serializers)
        return grpc.stream_stream_rpc_method_handler(self._many(method, handler.stream_stream), *serializers)

    def _one(self, method: str, behaviour: Any) -> Any:
        async def call(request: Any, context: Context) -> Any:
            place = await self._enter(method, request, context)
            try:
                return await behaviour(request, context)
            finally:
                place.release()

        return call

    def _upload(self, method: str, behaviour: Any) -> Any:
        async def whole(requests: AsyncIterator[Any], context: Context) -> Any:
            return await behaviour(self._sent(requests, context), context)

        return self._one(method, whole)

    async def _sent(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        """`requests`, as long as none is waited for too long."""
        parts = aiter(requests)
        while True:
            try:
                part = await asyncio.wait_for(anext(parts, None), self._patience_s)
            except TimeoutError:
                silence = f"nothing was sent for {self._patience_s:g} s; begin again"
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, silence)
            if part is None:
                return
            yield part

    def _many(self, method: str, behaviour: Any) -> Any:
        if not inspect.isasyncgenfunction(behaviour):  # it writes its answers itself
            return self._one(method, behaviour)

        async def call(request: Any, context: Context) -> None:
            place = await self._enter(method, request, context)
            try:
                if not await self._give(behaviour(request, context), context):
                    place.count_only_of_peer()
                    unread = f"no answer was taken for {self._patience_s:g} s; ask again"
                    with suppress(grpc.aio.InternalError):  # its caller has gone without having read it
                        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, unread)
            finally:
                place.release()

        return call

    async def _give(self, answers: AsyncGenerator[Any, None], context: Context) -> bool:
        """Whether all were taken. What makes them is closed in any case."""
        async with aclosing(answers):
            async for answer in answers:
                try:
                    async with asyncio.timeout(self._patience_s):
                        await context.write(answer)
                except TimeoutError:
                    return False
                del answer  # not held while the next is made
        return True

    async def _enter(self, method: str, request: Any, context: Context) -> Place:
        """Counts the call, or refuses it."""
        bound, peer = BOUNDS[method], self._peer_of(context)
        model = getattr(request, "model", None) or getattr(request, "name", "")  # of DescribeModel
        limits = {(OF_ALL, method): bound.calls, (OF_PEER, f"{method} {peer}"): bound.of_peer}
        if bound.of_model is not None:
            limits[OF_MODEL, f"{method} {model}"] = bound.of_model
        if any(self._running[row] >= limit for row, limit in limits.items()):
            of = {OF_ALL: f"calls of {method.rpartition('/')[2]} run", OF_PEER: f"of {peer}", OF_MODEL: f"of {model!r}"}
            counts = ", ".join(f"{self._running[row]} of {limit} {of[row[0]]}" for row, limit in limits.items())
            await context.abort(grpc.StatusCode.ABORTED, f"weightd is busy: {counts}; try again")
        place = Place(self._running, list(limits))
        _place.set(place)
        return place


def host_of(peer: str) -> str:
    """`peer` as gRPC spells it, without the port of a TCP connection: many connections are one peer."""
    return "unix" if peer.startswith("unix:") else peer.rpartition(":")[0]
