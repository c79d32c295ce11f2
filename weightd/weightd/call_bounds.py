"""How many long calls run at once, so that no client shuts out another's control calls or grows the daemon.

A call named here stays as long as its client or the device likes: it has a bound of its own, well below CALLS_MAX, of
which one peer gets a part. (gRPC tells TCP peers apart; those of a Unix socket all look the same and share a part.)
All other calls end by themselves.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
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
STREAMS_MAX = 64  # of one connection; a client has a few, and several may share one through a proxy
METADATA_BYTES_MAX = 16 << 10  # an identity of 256 groups has at most 1.4 KiB
RECORD_BYTES_MAX = 16 << 20  # a model's record, the largest answer; the client takes as much

# A peer that is frozen, or cut off by a network that drops its packets, is found out within 50 s, so that what its
# calls hold comes free. A living one may ping us as often as our clients do (each 20 s) and a little more often.
KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 20_000
PING_INTERVAL_MIN_MS = 10_000
PATIENCE_S = 60.0  # between two pieces of an upload, whose caller is alive and reads files of its own
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
]


@dataclass(frozen=True)
class Bound:
    """Of one method: calls at once, and of those, calls of one peer."""

    calls: int
    of_peer: int


BOUNDS = {
    f"/{SERVICE_NAME}/Fetch": Bound(FETCHES_MAX, FETCHES_MAX // 2),
    f"/{SERVICE_NAME}/OpenSession": Bound(OPENS_MAX, OPENS_MAX // 2),
    f"/{SERVICE_NAME}/PublishCalibration": Bound(PUBLISHES_MAX, PUBLISHES_MAX),
    "/grpc.health.v1.Health/Watch": Bound(16, 16),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Bound(8, 8),
}
assert 2 * sum(bound.calls for bound in BOUNDS.values()) <= CALLS_MAX

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any  # grpc.RpcMethodHandler is not generic at run time, only in its types


class CallBounds(grpc.aio.ServerInterceptor):
    """Refuses calls beyond BOUNDS with ABORTED: the caller asks again a little later.

    Ends uploads whose caller sends nothing for `patience_s` with DEADLINE_EXCEEDED. (A stream that nobody reads cannot
    be ended so: gRPC takes no status while a message waits. It ends with its caller's deadline or connection.)
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._running: Counter[tuple[str, str]] = Counter()  # by method and peer

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
            await self._enter(method, context)
            return await behaviour(request, context)

        return call

    def _upload(self, method: str, behaviour: Any) -> Any:
        async def call(requests: AsyncIterator[Any], context: Context) -> Any:
            await self._enter(method, context)
            return await behaviour(self._sent(requests, context), context)

        return call

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

        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            await self._enter(method, context)
            async for response in behaviour(request, context):
                yield response

        return call

    async def _enter(self, method: str, context: Context) -> None:
        """Counts the call until it ends, or refuses it."""
        peer = _host(context.peer())
        bound = BOUNDS[method]
        running = sum(count for (of_method, _), count in self._running.items() if of_method == method)
        if running >= bound.calls or self._running[method, peer] >= bound.of_peer:
            name = method.rpartition("/")[2]
            await context.abort(
                grpc.StatusCode.ABORTED,
                f"weightd is busy with {running} calls of {name}, {self._running[method, peer]} of {peer}: at most "
                f"{bound.calls} run at once, {bound.of_peer} of one peer; try again",
            )
        self._running[method, peer] += 1
        context.add_done_callback(lambda _: self._leave(method, peer))  # type: ignore[arg-type]

    def _leave(self, method: str, peer: str) -> None:
        self._running[method, peer] -= 1
        if not self._running[method, peer]:
            del self._running[method, peer]


def _host(peer: str) -> str:
    """`peer` as gRPC spells it, without the port of a TCP connection: many connections are one peer."""
    return "unix" if peer.startswith("unix:") else peer.rpartition(":")[0]
