"""Bounds on calls, so that no client can shut out others or make the daemon grow.

Every call takes a place before its request is read. It keeps the place until its answer has been sent and all work that
it began has ended (keeping_place). So the number of places bounds the requests, the answers, and the threads that wait
for a device. One peer gets at most CALLS_OF_PEER places. A method named in BOUNDS may take long and has a bound of its
own, of which one peer, and one model, get only a part. The last quarter of the places is reserved for peers that have
none. The front says who a peer is: a user of this machine, the names of a certificate, or a host.

A request is parsed only after its size and its number of fields have been checked (weightd.gateway.wire).
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from weightd.errors import BusyError, LimitError, RequestError, SilenceError
from weightd.gateway.wire import count_fields
from weightd.serving.fetch import FETCH_RANGES_MAX, REQUEST_BYTES_MAX
from weightd.serving.status import refusal_of
from weightd_proto import weightd_pb2

SERVICE_NAME = weightd_pb2.DESCRIPTOR.services_by_name["Weightd"].full_name

CALLS_MAX = 256  # calls at once, all methods together
CALLS_OF_PEER = 64  # calls of one peer at once
FETCHES_MAX = 12  # Fetch calls at once; each may hold about 6 MiB, here and in gRPC: 72 MiB of the interpreter's 150
OPENS_MAX = 32  # OpenSession calls at once; reading resident weights may take minutes
PUBLISHES_MAX = 4  # PublishCalibration calls at once
LOOKUPS_MAX = 32  # ListModels and DescribeModel calls at once; they are short, unless the store's device hangs
STREAMS_MAX = 64  # calls at once on one connection, which clients behind a proxy may share; one client has a few
METADATA_BYTES_MAX = 16 << 10  # metadata of a call; an identity of 256 groups has at most 1.4 KiB
RECORD_BYTES_MAX = 16 << 20  # a response; the largest is a model's record, and the client accepts as much

# A peer that is frozen or cut off is detected within 50 s, and its calls release what they hold. Clients
# ping every 20 s; pings a little more often are accepted.
KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 20_000
PING_INTERVAL_MIN_MS = 10_000
PATIENCE_S = 60.0  # how long a call waits for its request, for an upload's next piece, and until its answer is read
# A slower upload is ended once it is PATIENCE_S behind, because it could keep its place for ever.
UPLOAD_BYTES_PER_S_MIN = 64 << 10
NAMES_BYTES_MAX = 4 << 10  # a request that holds little more than a model's name
# The most fields of a request. A message of up to UNCOUNTED_BYTES cannot have more, because a field takes two bytes.
FIELDS_MAX = FETCH_RANGES_MAX + 64
UNCOUNTED_BYTES = 2 * FIELDS_MAX
# Connections are closed after a while, with time for running calls, so that the peer is identified again when it
# connects again. The longest call of a client, an OpenSession that reads resident weights, times out after 10 minutes.
CONNECTION_IDLE_MS = 300_000  # time without a call; gRPC's clients connect again when they need to
CONNECTION_AGE_MS = 600_000
CONNECTION_AGE_GRACE_MS = 1_200_000

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
    ("grpc.max_send_message_length", RECORD_BYTES_MAX),
    ("grpc.max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.max_concurrent_streams", STREAMS_MAX),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MIN_MS),
    ("grpc.http2.max_pings_without_data", 0),  # no bound: a silent connection may be pinged for ever
    ("grpc.max_connection_idle_ms", CONNECTION_IDLE_MS),
    ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
    ("grpc.max_connection_age_grace_ms", CONNECTION_AGE_GRACE_MS),
]


@dataclass(frozen=True)
class Bound:
    """The bounds of one method: its concurrent calls in all, of one peer and for one model, and its request's size."""

    calls: int
    of_peer: int
    of_model: int | None = None
    request_bytes: int = NAMES_BYTES_MAX
    request: type[Message] | None = None  # needed if request_bytes is above UNCOUNTED_BYTES


BOUNDS = {
    f"/{SERVICE_NAME}/Fetch": Bound(
        FETCHES_MAX,
        FETCHES_MAX // 2,
        FETCHES_MAX * 2 // 3,
        REQUEST_BYTES_MAX,
        weightd_pb2.FetchRequest,
    ),
    f"/{SERVICE_NAME}/OpenSession": Bound(OPENS_MAX, OPENS_MAX // 2, OPENS_MAX * 3 // 4),
    f"/{SERVICE_NAME}/PublishCalibration": Bound(
        PUBLISHES_MAX,
        PUBLISHES_MAX // 2,
        request_bytes=REQUEST_BYTES_MAX,
        request=weightd_pb2.PublishCalibrationRequest,
    ),
    f"/{SERVICE_NAME}/ListModels": Bound(LOOKUPS_MAX // 2, LOOKUPS_MAX // 4),
    f"/{SERVICE_NAME}/DescribeModel": Bound(LOOKUPS_MAX // 2, LOOKUPS_MAX // 4, LOOKUPS_MAX * 3 // 8),
    "/grpc.health.v1.Health/Watch": Bound(16, 8),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Bound(8, 4),
}
ANY = Bound(CALLS_MAX, CALLS_OF_PEER)  # the bound of all methods together
assert 2 * sum(bound.calls for bound in BOUNDS.values()) <= CALLS_MAX

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any  # grpc.RpcMethodHandler is not generic at run time, only in its types
OF_ALL, OF_PEER, OF_MODEL = "all", "peer", "model"


class CallPlace:
    """One of the places that BOUNDS allows. A call holds it until the call and the work that it began have ended."""

    def __init__(self, running: Counter[tuple[str, str]], peer: str) -> None:
        """`running` counts the calls of each row; a row is all calls, a method's, a peer's or a model's."""
        self._running = running
        self._peer = peer
        self._rows: list[tuple[str, str]] = []
        self._held = 1

    def enter(self, what: str, bound: Bound) -> None:
        """Counts a call of `what`. Raises BusyError if too many run, in all or of this peer."""
        of_all, of_peer = (OF_ALL, what), (OF_PEER, f"{what} {self._peer}")
        calls = bound.calls - bound.calls // 4 if self._running[of_peer] else bound.calls
        if self._running[of_all] >= calls or self._running[of_peer] >= bound.of_peer:
            raise BusyError(
                f"weightd is busy: {self._running[of_all]} of {bound.calls} {what} run, {self._running[of_peer]} of "
                f"{bound.of_peer} of {self._peer}; try again"
            )
        self._count(of_all, of_peer)

    def enter_model(self, what: str, model: str, most: int) -> None:
        """Counts a call for `model`. Raises BusyError if `most` calls of `what` for it run already."""
        row = (OF_MODEL, f"{what} {model}")
        if self._running[row] >= most:
            raise BusyError(
                f"weightd is busy: {self._running[row]} of {most} {what} run that want {model!r}; try again"
            )
        self._count(row)

    def hold(self) -> None:
        """Holds the place for work that the call began. Each hold() needs one release()."""
        self._held += 1

    def hold_until_done(self, context: Context) -> None:
        """Holds the place until gRPC has sent the whole answer, or the caller has disconnected."""
        self.hold()
        held = [self.release]

        def done(_: object) -> None:
            while held:
                held.pop()()

        context.add_done_callback(done)  # type: ignore[arg-type]  # whose parameter has another name
        if context.done():  # before the callback was added
            done(context)

    def release(self) -> None:
        self._held -= 1
        if not self._held:
            self._running.subtract(self._rows)
            for row in self._rows:
                if not self._running[row]:
                    del self._running[row]

    def _count(self, *rows: tuple[str, str]) -> None:
        self._rows += rows
        self._running.update(rows)


_place: ContextVar[CallPlace | None] = ContextVar("place", default=None)


def keeping_place() -> Callable[[], None]:
    """Holds the current call's place until the returned function is called, on the event loop."""
    place = _place.get()
    if place is None:
        return lambda: None
    place.hold()
    return place.release


class CallBounds(grpc.aio.ServerInterceptor):
    """Refuses calls beyond BOUNDS with ABORTED (the caller tries again later) and too large messages with
    RESOURCE_EXHAUSTED, and turns exceptions of a call into a status.

    Ends a call with DEADLINE_EXCEEDED if its caller sends nothing, or reads nothing, for `patience_s`. In the second
    case the connection is closed too, because gRPC keeps answers that were not read.
    """

    def __init__(
        self, peer_of: Callable[[Context], str], hang_up: Callable[[Context], None], patience_s: float = PATIENCE_S
    ) -> None:
        """`peer_of` names the peer of a call. `hang_up` closes the connection of a call."""
        self._peer_of = peer_of
        self._hang_up = hang_up
        self._patience_s = patience_s
        self._running: Counter[tuple[str, str]] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Presents the method to gRPC as a stream of bytes in both directions, so that this class does the reading."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method

        async def call(_: Any, context: Context) -> None:
            await self._call(method, handler, context)

        return grpc.stream_stream_rpc_method_handler(call, None, handler.response_serializer)

    async def _call(self, method: str, handler: Handler, context: Context) -> None:
        place = CallPlace(self._running, self._peer_of(context))
        place.hold_until_done(context)
        try:
            if (refusal := await self._refusal(method, handler, context, place)) is not None:
                await context.abort(*refusal)
        except grpc.aio.InternalError:  # the caller has disconnected without reading the status
            pass
        except grpc.aio.AbortError as error:
            error.__traceback__ = None  # gRPC keeps the error, and with it everything that its frames refer to
        finally:
            place.release()

    async def _refusal(
        self, method: str, handler: Handler, context: Context, place: CallPlace
    ) -> tuple[grpc.StatusCode, str] | None:
        """Answers the call. Returns the status of a refusal, or None."""
        try:
            await self._answer(method, handler, context, place)
        except (grpc.aio.AbortError, grpc.aio.InternalError):  # by gRPC's own services; the caller has disconnected
            raise
        except Exception as error:
            return refusal_of(error)
        return None

    async def _answer(self, method: str, handler: Handler, context: Context, place: CallPlace) -> None:
        bound, name = BOUNDS.get(method), f"calls of {method.rpartition('/')[2]}"
        place.enter("calls", ANY)
        if bound is not None:
            place.enter(name, bound)
        _place.set(place)
        incoming = Incoming(bound or ANY, handler.request_deserializer, context, self._patience_s)
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        if handler.request_streaming:
            given: Any = incoming.all()
        else:
            given = await incoming.one()
            if bound is not None and bound.of_model is not None:
                model: str = getattr(given, "model", "") or getattr(given, "name", "")  # of DescribeModel
                place.enter_model(name, model, bound.of_model)
        if not handler.response_streaming:
            await self._give(await behaviour(given, context), context)
        elif inspect.isasyncgenfunction(behaviour):
            await self._give_all(behaviour(given, context), context)
        else:  # the method writes its answers itself
            await behaviour(given, context)

    async def _give_all(self, answers: AsyncGenerator[Any, None], context: Context) -> None:
        """Sends all answers and closes the generator, also after an error."""
        async with aclosing(answers):
            async for answer in answers:
                await self._give(answer, context)
                del answer  # not held while the next is made

    async def _give(self, answer: Any, context: Context) -> None:
        try:
            async with asyncio.timeout(self._patience_s):
                await context.write(answer)
        except TimeoutError:
            asyncio.get_running_loop().call_soon(self._hang_up, context)  # after the status has been sent
            raise SilenceError(f"no answer was taken for {self._patience_s:g} s; ask again") from None


class Incoming:
    """The messages of one call."""

    def __init__(self, bound: Bound, parse: Callable[[bytes], Any], context: Context, patience_s: float) -> None:
        self._bound = bound
        self._parse = parse
        self._context = context
        self._patience_s = patience_s
        self._received_bytes = 0
        self._waited_s = 0.0

    async def one(self) -> Any:
        """The only message. Raises RequestError if there is none, and what all() raises."""
        if (message := await self._next()) is None:
            raise RequestError("a call without its message")
        return message

    async def all(self) -> AsyncIterator[Any]:
        """Raises SilenceError (they arrive too slowly), LimitError (one is too large), RequestError (not a message)."""
        while (message := await self._next()) is not None:
            yield message

    async def _next(self) -> Any:
        """None at the end."""
        left_s = self._patience_s + self._received_bytes / UPLOAD_BYTES_PER_S_MIN - self._waited_s
        asked_s = time.monotonic()
        try:
            async with asyncio.timeout(min(self._patience_s, left_s)):
                message = await self._context.read()
        except TimeoutError:
            raise SilenceError(f"too little was sent for {self._patience_s:g} s; begin again") from None
        if message is grpc.aio.EOF:
            return None
        self._waited_s += time.monotonic() - asked_s
        self._received_bytes += len(message)
        return self._parsed(message)

    def _parsed(self, message: bytes) -> Any:
        bound = self._bound
        if len(message) > bound.request_bytes:
            raise LimitError(f"a message of {len(message)} bytes: this call takes at most {bound.request_bytes}")
        try:
            if len(message) > UNCOUNTED_BYTES:
                self._require_few_fields(message)
            return self._parse(message)
        except (DecodeError, ValueError) as error:
            raise RequestError(f"a message that cannot be read: {error}") from None

    def _require_few_fields(self, message: bytes) -> None:
        assert self._bound.request is not None
        if count_fields(message, self._bound.request, FIELDS_MAX) > FIELDS_MAX:
            raise LimitError(f"a message of more than {FIELDS_MAX} fields: ask in several calls")
