"""The control plane: what each call of proto/weightd.proto does.

Calls of the engine and the store block, so they run in a few worker threads, never on the event loop. A Fetch makes
its next answer when the client has taken the last.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from weightd._native import Engine
from weightd.errors import CorruptionError, StoppingError
from weightd.fetch import Fetcher
from weightd.served_models import ServedModel, ServedModels
from weightd.status import answered, answered_stream
from weightd_proto import weightd_pb2

WORKERS_MAX = 8  # threads for blocking calls
SERVICE_NAME = weightd_pb2.DESCRIPTOR.services_by_name["Weightd"].full_name

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

    def close(self) -> None:
        """Ends the engine; calls still in it are answered with UNAVAILABLE."""
        self._stopping = True
        self._engine.close()
        self._workers.shutdown()

    @answered
    async def ListModels(self, request: weightd_pb2.ListModelsRequest) -> weightd_pb2.ListModelsResponse:
        return weightd_pb2.ListModelsResponse(names=await self._run(self._models.names))

    @answered
    async def DescribeModel(self, request: weightd_pb2.DescribeModelRequest) -> weightd_pb2.Model:
        return (await self._find(request.name)).record

    @answered
    async def OpenSession(self, request: weightd_pb2.OpenSessionRequest) -> weightd_pb2.OpenSessionResponse:
        served = await self._find(request.model)
        token, share = await self._run(lambda: self._open_session(served, request.slots_wanted))
        return weightd_pb2.OpenSessionResponse(token=token, data_socket=self._data_socket, share_slots=share)

    @answered_stream
    async def Fetch(self, request: weightd_pb2.FetchRequest) -> AsyncIterator[weightd_pb2.FetchResponse]:
        served = await self._find(request.model)
        answers = await self._run(lambda: self._fetcher.answers(served, request))
        while (data := await self._run(lambda: next(answers, None))) is not None:
            yield weightd_pb2.FetchResponse(data=data)

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

    async def _find(self, name: str) -> ServedModel:
        return await self._run(lambda: self._models.find(name))

    def _open_session(self, served: ServedModel, slots_wanted: int) -> tuple[bytes, int]:
        try:
            token, share = self._engine.open_session(served.number, slots_wanted)
        except RuntimeError as error:  # the resident weights differ from their checksums
            raise CorruptionError(str(error)) from error
        return token, share

    async def _run(self, work: Callable[[], Result]) -> Result:
        """`work` in a worker thread. What fails because the engine ends is a StoppingError."""
        if self._stopping:
            raise StoppingError("weightd is stopping")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._workers, work)
        except Exception as error:
            if self._stopping:
                raise StoppingError("weightd is stopping") from error
            raise
