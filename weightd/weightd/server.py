"""The control plane: what each call of proto/weightd.proto does.

Calls of the engine and the store block, so they run in worker threads, never on the event loop: long ones (a Fetch, the
opening of a session, the files of a calibration) in threads of their own, as many as there can be such calls, so that
none waits for another model's device and the short ones never wait for them. A Fetch makes its next answer when the
client has taken the last.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import TypeVar

from weightd import _native
from weightd._native import Engine
from weightd.access import Caller, Rules, may_read, require_publish, require_read
from weightd.calibration import CalibrationStaging
from weightd.call_bounds import FETCHES_MAX, OPENS_MAX, PUBLISHES_MAX
from weightd.errors import CorruptionError, RequestError, SpaceError, StoppingError, StoreError
from weightd.fetch import RESPONSE_BYTES_MAX, Fetcher
from weightd.identity import Context, Identities
from weightd.served_models import ServedModel, ServedModels, demand_of
from weightd.sizes import format_size
from weightd.statistics import Statistics
from weightd.status import answered, answered_stream
from weightd_proto import weightd_pb2

WORKERS_MAX = 4  # threads for short calls
ANYBODY = -1  # to the engine: a session for whoever has its token

Result = TypeVar("Result")


class WeightdService:
    """The service weightd.v1.Weightd. (gRPC finds the methods by their names; no generated base class is needed.)"""

    def __init__(
        self,
        models: ServedModels,
        fetcher: Fetcher,
        engine: Engine,
        identities: Identities,
        data_socket: str,
        dram_bytes: int,
        statistics: Statistics,
    ) -> None:
        self._models = models
        self._fetcher = fetcher
        self._engine = engine
        self._identities = identities
        self._allow: Rules = ()
        self._allow_publish: Rules = ()
        self._data_socket = data_socket
        self._dram_bytes = dram_bytes
        self._statistics = statistics
        self._stopping = False
        self._workers = ThreadPoolExecutor(WORKERS_MAX, thread_name_prefix="weightd-call")
        self._openers = ThreadPoolExecutor(OPENS_MAX + PUBLISHES_MAX, thread_name_prefix="weightd-open")
        self._fetchers = ThreadPoolExecutor(FETCHES_MAX, thread_name_prefix="weightd-fetch")

    def close(self) -> None:
        """Ends the engine; calls still in it are answered with UNAVAILABLE."""
        self._stopping = True
        self._engine.close()
        for threads in (self._workers, self._openers, self._fetchers):
            threads.shutdown()

    def set_rules(self, allow: Rules, allow_publish: Rules) -> None:
        """Who may read and publish what, from the next call on. Sessions that are open go on."""
        self._allow, self._allow_publish = allow, allow_publish

    @answered
    async def ListModels(
        self, request: weightd_pb2.ListModelsRequest, context: Context
    ) -> weightd_pb2.ListModelsResponse:
        caller = self._identities.caller(context)
        names = await self._run(self._models.names)
        return weightd_pb2.ListModelsResponse(names=[name for name in names if may_read(caller, name, self._allow)])

    @answered
    async def DescribeModel(self, request: weightd_pb2.DescribeModelRequest, context: Context) -> weightd_pb2.Model:
        return (await self._readable(request.name, context)).record

    @answered
    async def OpenSession(
        self, request: weightd_pb2.OpenSessionRequest, context: Context
    ) -> weightd_pb2.OpenSessionResponse:
        caller = self._identities.caller(context)
        served = await self._readable(request.model, context, request.import_id)
        token, share = await self._run(lambda: self._open_session(served, request.slots_wanted, caller), self._openers)
        return weightd_pb2.OpenSessionResponse(token=token, data_socket=self._data_socket, share_slots=share)

    @answered_stream
    async def Fetch(
        self, request: weightd_pb2.FetchRequest, context: Context
    ) -> AsyncIterator[weightd_pb2.FetchResponse]:
        served = await self._readable(request.model, context, request.import_id)
        answers = await self._run(lambda: self._fetcher.answers(served, request), self._fetchers)
        while (data := await self._run(lambda: next(answers, None), self._fetchers)) is not None:
            response = weightd_pb2.FetchResponse(data=data)
            del data  # not held while the client takes its time
            yield response

    @answered
    async def PublishCalibration(
        self, requests: AsyncIterator[weightd_pb2.PublishCalibrationRequest], context: Context
    ) -> weightd_pb2.Calibration:
        caller = self._identities.caller(context)
        parts = aiter(requests)
        first = await anext(parts, weightd_pb2.PublishCalibrationRequest())
        if first.WhichOneof("part") != "header":
            raise RequestError("a calibration begins with its header")
        model = first.header.model
        require_publish(caller, model, self._allow, self._allow_publish)
        served = await self._readable(model, context)
        with ExitStack() as undo:
            staging = await self._run_whole(lambda: undo.enter_context(self._stage(served, first.header.calibration)))
            async for request in parts:
                await self._run_whole(functools.partial(staging.write, _data(request)))
            return await self._run_whole(lambda: self._models.publish(served, staging))

    @answered
    async def Stats(self, request: weightd_pb2.StatsRequest, context: Context) -> weightd_pb2.StatsResponse:
        caller = self._identities.caller(context)
        stats = await self._run(self._statistics.now)
        models = [model for model in stats.models if may_read(caller, model.name, self._allow)]
        attached = [session for session in stats.attached if may_read(caller, session.model, self._allow)]
        del stats.models[:], stats.attached[:]
        stats.models.extend(models)
        stats.attached.extend(attached)
        return stats

    async def _readable(self, name: str, context: Context, import_id: bytes = b"") -> ServedModel:
        """The model; `import_id`: the only import of it that will do, empty for any.

        Raises ForbiddenError, UnknownModelError (names what the caller may read), StoreError (another import), and as
        find().
        """
        caller = self._identities.caller(context)
        require_read(caller, name, self._allow)
        served = await self._run(lambda: self._models.find(name, lambda other: may_read(caller, other, self._allow)))
        if import_id and import_id != served.record.import_id:
            raise StoreError(f"{name!r} is another import than the one asked for: make a new client")
        return served

    def _stage(self, served: ServedModel, offered: weightd_pb2.Calibration) -> CalibrationStaging:
        record = weightd_pb2.Model()
        record.CopyFrom(served.record)
        record.calibration.CopyFrom(offered)
        needed_bytes = demand_of(record).minimum_bytes
        if needed_bytes > self._dram_bytes:
            raise SpaceError(
                f"{record.name!r} with these predictors needs {format_size(needed_bytes)} of --dram, this weightd has "
                f"{format_size(self._dram_bytes)}: raise --dram, or calibrate with a smaller rank"
            )
        return self._models.stage(served, offered)

    def _open_session(self, served: ServedModel, slots_wanted: int, caller: Caller) -> tuple[bytes, int]:
        user_id = ANYBODY if caller.user_id is None else caller.user_id
        try:
            token, share = self._engine.open_session(served.number, slots_wanted, user_id)
        except _native.CorruptResident as error:
            raise CorruptionError(str(error)) from error
        return token, share

    async def _run(self, work: Callable[[], Result], threads: ThreadPoolExecutor | None = None) -> Result:
        """`work` in a worker thread. What fails because the engine ends is a StoppingError."""
        if self._stopping:
            raise StoppingError("weightd is stopping")
        try:
            return await asyncio.get_running_loop().run_in_executor(threads or self._workers, work)
        except Exception as error:
            if self._stopping:
                raise StoppingError("weightd is stopping") from error
            raise

    async def _run_whole(self, work: Callable[[], Result]) -> Result:
        """The same, but a cancelled call ends when `work` has: what that touches can be taken back then."""
        running = asyncio.ensure_future(self._run(work, self._openers))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            with suppress(Exception):
                await running
            raise


def _data(request: weightd_pb2.PublishCalibrationRequest) -> bytes:
    if request.WhichOneof("part") != "data":
        raise RequestError("a calibration has one header, then data")
    if len(request.data) > RESPONSE_BYTES_MAX:
        raise RequestError(f"{len(request.data)} bytes in one message: at most {RESPONSE_BYTES_MAX}")
    return bytes(request.data)
