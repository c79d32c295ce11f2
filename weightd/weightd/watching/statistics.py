"""The daemon's numbers as one message: what Stats answers, `--metrics` serves and `weightd top` shows."""

from __future__ import annotations

from collections.abc import Sequence

from weightd import _native
from weightd._native import EngineThread
from weightd_proto import weightd_pb2


class Statistics:
    """Makes StatsResponses of what the engine counts; safe to use from several threads."""

    def __init__(self, engine: EngineThread, sequential_gb_per_s: float, pressure_watched: Sequence[str] = ()) -> None:
        """`sequential_gb_per_s`: of the device profile, 0 when it was not measured."""
        self._engine = engine
        self._sequential_gb_per_s = sequential_gb_per_s
        self._pressure_watched = pressure_watched

    def now(self) -> weightd_pb2.StatsResponse:
        """The numbers of this moment. Raises _native.Stopping once the engine has ended."""
        stats = self._engine.stats()
        return weightd_pb2.StatsResponse(
            io_engine=self._engine.io_engine,
            dram_limit_bytes=stats["limit_bytes"],
            dram_pool_bytes=stats["pool_bytes"],
            dram_resident_bytes=stats["resident_bytes"],
            dram_tables_bytes=stats["tables_bytes"],
            sessions=stats["sessions"],
            models=[weightd_pb2.ModelStats(name=name, **row) for name, row in sorted(stats["models"].items())],
            device_sequential_gb_per_s=self._sequential_gb_per_s,
            attached=[weightd_pb2.SessionStats(**row) for row in stats["attached"]],
            read_queue=weightd_pb2.ReadQueue(**stats["read_queue"]),
            memory_pressure=weightd_pb2.MemoryPressure(watched=self._pressure_watched, **stats["memory_pressure"]),
            read_latency_bounds_s=_native.READ_LATENCY_BOUNDS_S,
            uptime_s=stats["uptime_s"],
            sessions_limit=_native.SESSIONS_MAX,
        )
