"""The control plane: what each call of proto/weightd.proto does.

Calls of the engine and the store block, so they run in worker threads, never on the event loop. Calls that read from
the device (a Fetch, the opening of a model or a session, the files of a calibration, a lookup in the catalog) have
thread pools as large as call_bounds allows calls. So no call waits for another model's device, and Stats, which reads
memory only, waits for none. A Fetch makes its next answer when the client has taken the last.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import TypeVar

from weightd import _native
from weightd._native import EngineThread
from weightd.errors import (
    CorruptionError,
    DeviceError,
    RequestError,
    SpaceError,
    StoppingError,
    StoreError,
)
from weightd.gateway.access import Caller, Rules, may_read, require_publish, require_read, require_trusted
from weightd.gateway.identity import Context, Identities
from weightd.machine.budget import GrowingDram
from weightd.serving.call_bounds import CALLS_MAX, FETCHES_MAX, keeping_place
from weightd.serving.fetch import RESPONSE_BYTES_MAX, Fetcher
from weightd.serving.served_models import ANSWER_WITHIN_S, ServedModel, ServedModels, demand_of
from weightd.sizes import format_enough, format_size
from weightd.store.calibration import CalibrationStaging, check_calibration
from weightd.watching.statistics import Statistics
from weightd_proto import weightd_pb2
from weightd_proto.tables import model_of

WORKERS_MAX = 4  # threads for calls that do not read from the device
ANYBODY = -1  # a user id for the engine: any process that has the token may attach
SESSION_COST = 50  # in frames (users.py), in addition to a call's: memory is mapped, tables are made

Result = TypeVar("Result")


class ControlPlane:
    """The service weightd.v1.Weightd. (gRPC finds the methods by their names; no generated base class is needed.)"""

    def __init__(
        self,
        models: ServedModels,
        fetcher: Fetcher,
        engine: EngineThread,
        identities: Identities,
        data_socket: str,
        dram: GrowingDram,
        statistics: Statistics,
    ) -> None:
        self._models = models
        self._fetcher = fetcher
        self._engine = engine
        self._identities = identities
        self._allow: Rules = ()
        self._allow_publish: Rules = ()
        self._data_socket = os.fsencode(data_socket).decode()  # UTF-8 for clients, whatever our locale is
        self._dram = dram
        self._statistics = statistics
        self._stopping = False
        self._opening: dict[str, asyncio.Task[ServedModel]] = {}
        self._workers = ThreadPoolExecutor(WORKERS_MAX, thread_name_prefix="weightd-call")
        self._askers = ThreadPoolExecutor(CALLS_MAX, thread_name_prefix="weightd-ask")  # started as they are needed
        self._fetchers = ThreadPoolExecutor(FETCHES_MAX, thread_name_prefix="weightd-fetch")

    def close(self) -> None:
        """Stops the engine. Calls that still run are answered with UNAVAILABLE."""
        self._stopping = True
        self._engine.close()
        for threads in (self._workers, self._askers, self._fetchers):
            threads.shutdown()

    def set_rules(self, allow: Rules, allow_publish: Rules) -> None:
        """Applies rules for reading and publishing from the next call on. Open sessions are not affected."""
        self._allow, self._allow_publish = allow, allow_publish

    def peer_of(self, context: Context) -> str:
        """The name under which a caller's calls are counted. It comes from the connection, not from the call."""
        origin = self._identities.origin(context)
        return "callers whose connection has ended" if origin is None else origin.peer

    def hang_up(self, context: Context) -> None:
        """Closes the connection of a caller that reads no answers, because gRPC would keep them."""
        if (origin := self._identities.origin(context)) is not None:
            origin.hang_up()

    async def ListModels(
        self, request: weightd_pb2.ListModelsRequest, context: Context
    ) -> weightd_pb2.ListModelsResponse:
        caller = self._identities.caller(context)
        names = await self._run(self._models.names, self._askers)
        return weightd_pb2.ListModelsResponse(names=[name for name in names if may_read(caller, name, self._allow)])

    async def DescribeModel(self, request: weightd_pb2.DescribeModelRequest, context: Context) -> weightd_pb2.Model:
        return (await self._readable(request.name, context)).record

    async def OpenSession(
        self, request: weightd_pb2.OpenSessionRequest, context: Context
    ) -> weightd_pb2.OpenSessionResponse:
        caller = self._identities.caller(context)
        if (origin := self._identities.origin(context)) is not None:
            origin.charge(SESSION_COST)
        served = await self._readable(request.model, context, request.import_id)
        token, share = await self._run(lambda: self._open_session(served, request, caller), self._askers)
        return weightd_pb2.OpenSessionResponse(token=token, data_socket=self._data_socket, share_slots=share)

    async def Fetch(
        self, request: weightd_pb2.FetchRequest, context: Context
    ) -> AsyncIterator[weightd_pb2.FetchResponse]:
        served = await self._readable(request.model, context, request.import_id)
        answers = await self._run(lambda: self._fetcher.answers(served, request), self._fetchers)
        while (data := await self._run(lambda: next(answers, None), self._fetchers)) is not None:
            response = weightd_pb2.FetchResponse(data=data)
            del data  # must not be held while the client reads slowly
            yield response

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

    async def RemoveModel(
        self, request: weightd_pb2.RemoveModelRequest, context: Context
    ) -> weightd_pb2.RemoveModelResponse:
        require_trusted(self._identities.caller(context), "remove models")
        change = self._models.close_replaced if request.replaced else self._models.remove
        await self._run_whole(lambda: change(request.name))
        return weightd_pb2.RemoveModelResponse()

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
        """The opened model or table. `import_id` is the import that the caller wants, empty for any.

        Raises ForbiddenError, UnknownModelError (lists the models that the caller may read), StoreError (the stored
        import is another one), DeviceError (the device does not answer), and what ServedModels.open() raises.
        """
        caller = self._identities.caller(context)
        require_read(caller, name, self._allow)
        served = self._models.opened(name)
        if served is None:
            listed = functools.partial(self._may_list, caller)
            model = model_of(name)
            await self._run(lambda: self._models.require_known(model, listed), self._askers)
            served = await self._opened(model)
            if model != name:
                served = self._models.opened_table(name)
        if import_id and import_id != served.record.import_id:
            raise StoreError(f"{name!r} is another import than the one asked for: make a new client")
        return served

    def _may_list(self, caller: Caller, name: str) -> bool:
        return may_read(caller, name, self._allow)

    async def _opened(self, name: str) -> ServedModel:
        """Opens the model in one thread. All calls that want it wait here."""
        if name not in self._opening:
            opening = self._opening[name] = asyncio.create_task(
                self._run(lambda: self._models.open(name), self._askers)
            )
            opening.add_done_callback(functools.partial(self._end_opening, name))
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                return await asyncio.shield(self._opening[name])
        except TimeoutError as error:
            raise DeviceError(
                f"model {name!r} cannot be opened: the device has not answered for {ANSWER_WITHIN_S:g} s: check the "
                "device, then try again"
            ) from error

    def _end_opening(self, name: str, opening: asyncio.Task[ServedModel]) -> None:
        del self._opening[name]
        if not opening.cancelled():
            opening.exception()  # marks it as seen; otherwise asyncio logs it when no call waits for it

    def _stage(self, served: ServedModel, offered: weightd_pb2.Calibration) -> CalibrationStaging:
        check_calibration(served.record, offered)  # first, because the sizes come from a client
        record = weightd_pb2.Model()
        record.CopyFrom(served.record)
        record.calibration.CopyFrom(offered)
        needed_bytes = demand_of(record).minimum_bytes
        if needed_bytes > self._dram.dram_bytes:
            raise SpaceError(
                f"{record.name!r} with these predictors needs {format_enough(needed_bytes)} of --dram, this has "
                f"{format_size(self._dram.dram_bytes)}: raise --dram, or calibrate with a smaller rank"
            )
        return self._models.stage(served, offered)

    def _open_session(
        self, served: ServedModel, request: weightd_pb2.OpenSessionRequest, caller: Caller
    ) -> tuple[bytes, int]:
        user_id = ANYBODY if caller.user_id is None else caller.user_id
        try:
            token, share = self._engine.open_session(
                served.number, request.slots_wanted, user_id, predicts=not request.without_predictors
            )
        except _native.CorruptResident as error:
            raise CorruptionError(str(error)) from error
        return token, share

    async def _run(self, work: Callable[[], Result], threads: ThreadPoolExecutor | None = None) -> Result:
        """Runs `work` in a worker thread. The call keeps its place until `work` ends, even if the call ends earlier.

        Raises StoppingError for any failure while the engine is stopping.
        """
        if self._stopping:
            raise StoppingError("weightd is stopping")
        loop = asyncio.get_running_loop()
        leave_place = keeping_place()
        running = (threads or self._workers).submit(work)
        running.add_done_callback(lambda _: loop.call_soon_threadsafe(leave_place))
        try:
            return await asyncio.wrap_future(running)
        except Exception as error:
            if self._stopping:
                raise StoppingError("weightd is stopping") from error
            raise
        finally:
            del running  # otherwise its exception and this frame refer to each other

    async def _run_whole(self, work: Callable[[], Result]) -> Result:
        """Like _run, but a cancelled call waits for the end of `work`, so that its effects can be undone."""
        running = asyncio.ensure_future(self._run(work, self._askers))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            with suppress(Exception):
                await running
            raise
        finally:
            del running


def _data(request: weightd_pb2.PublishCalibrationRequest) -> bytes:
    if request.WhichOneof("part") != "data":
        raise RequestError("a calibration has one header, then data")
    if len(request.data) > RESPONSE_BYTES_MAX:
        raise RequestError(f"{len(request.data)} bytes in one message: at most {RESPONSE_BYTES_MAX}")
    return bytes(request.data)
