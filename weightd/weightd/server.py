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
from weightd.calibration import CalibrationStaging
from weightd.call_bounds import FETCHES_MAX, OPENS_MAX, PUBLISHES_MAX
from weightd.errors import CorruptionError, ForbiddenError, RequestError, SpaceError, StoppingError, StoreError
from weightd.fetch import RESPONSE_BYTES_MAX, Fetcher
from weightd.served_models import ServedModel, ServedModels, demand_of
from weightd.sizes import format_size
from weightd.status import answered, answered_stream, answered_upload
from weightd_proto import weightd_pb2

WORKERS_MAX = 4  # threads for short calls

Result = TypeVar("Result")


class WeightdService:
    """The service weightd.v1.Weightd. (gRPC finds the methods by their names; no generated base class is needed.)"""

    def __init__(
        self,
        models: ServedModels,
        fetcher: Fetcher,
        engine: Engine,
        data_socket: str,
        dram_bytes: int,
        sequential_gb_per_s: float,
    ) -> None:
        """`sequential_gb_per_s`: of the device profile, 0 when it was not measured."""
        self._models = models
        self._fetcher = fetcher
        self._engine = engine
        self._data_socket = data_socket
        self._dram_bytes = dram_bytes
        self._sequential_gb_per_s = sequential_gb_per_s
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

    @answered
    async def ListModels(self, request: weightd_pb2.ListModelsRequest) -> weightd_pb2.ListModelsResponse:
        return weightd_pb2.ListModelsResponse(names=await self._run(self._models.names))

    @answered
    async def DescribeModel(self, request: weightd_pb2.DescribeModelRequest) -> weightd_pb2.Model:
        return (await self._find(request.name)).record

    @answered
    async def OpenSession(self, request: weightd_pb2.OpenSessionRequest) -> weightd_pb2.OpenSessionResponse:
        served = await self._find(request.model, request.import_id)
        token, share = await self._run(lambda: self._open_session(served, request.slots_wanted), self._openers)
        return weightd_pb2.OpenSessionResponse(token=token, data_socket=self._data_socket, share_slots=share)

    @answered_stream
    async def Fetch(self, request: weightd_pb2.FetchRequest) -> AsyncIterator[weightd_pb2.FetchResponse]:
        served = await self._find(request.model, request.import_id)
        answers = await self._run(lambda: self._fetcher.answers(served, request), self._fetchers)
        while (data := await self._run(lambda: next(answers, None), self._fetchers)) is not None:
            response = weightd_pb2.FetchResponse(data=data)
            del data  # not held while the client takes its time
            yield response

    @answered_upload
    async def PublishCalibration(
        self, requests: AsyncIterator[weightd_pb2.PublishCalibrationRequest], peer: str
    ) -> weightd_pb2.Calibration:
        if not peer.startswith("unix:"):  # those sockets are open to our own user, our group and root
            raise ForbiddenError(f"{peer} may not publish: publish through the Unix socket, as a member of its group")
        parts = aiter(requests)
        first = await anext(parts, weightd_pb2.PublishCalibrationRequest())
        if first.WhichOneof("part") != "header":
            raise RequestError("a calibration begins with its header")
        served = await self._find(first.header.model)
        with ExitStack() as undo:
            staging = await self._run_whole(lambda: undo.enter_context(self._stage(served, first.header.calibration)))
            async for request in parts:
                await self._run_whole(functools.partial(staging.write, _data(request)))
            return await self._run_whole(lambda: self._models.publish(served, staging))

    @answered
    async def Stats(self, request: weightd_pb2.StatsRequest) -> weightd_pb2.StatsResponse:
        stats = await self._run(self._engine.stats)
        return weightd_pb2.StatsResponse(
            io_engine=self._engine.io_engine,
            dram_limit_bytes=self._dram_bytes,
            dram_pool_bytes=stats["pool_bytes"],
            dram_resident_bytes=stats["resident_bytes"],
            dram_tables_bytes=stats["tables_bytes"],
            sessions=stats["sessions"],
            models=[weightd_pb2.ModelStats(name=name, **row) for name, row in stats["models"].items()],
            device_sequential_gb_per_s=self._sequential_gb_per_s,
        )

    async def _find(self, name: str, import_id: bytes = b"") -> ServedModel:
        """`import_id`: the only import of the model that will do; empty for any. Raises StoreError for another one."""
        served = await self._run(lambda: self._models.find(name))
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

    def _open_session(self, served: ServedModel, slots_wanted: int) -> tuple[bytes, int]:
        try:
            token, share = self._engine.open_session(served.number, slots_wanted)
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
