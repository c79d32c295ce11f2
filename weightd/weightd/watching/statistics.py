"""The daemon's statistics as one message: what Stats answers, `--metrics` serves and `weightd top` shows."""

from __future__ import annotations

from collections.abc import Sequence

from weightd import _native
from weightd._native import EngineThread
from weightd_proto import weightd_pb2


class Statistics:
    """Makes a StatsResponse of what the engine counts. Safe to use from several threads."""

    def __init__(self, engine: EngineThread, sequential_gb_per_s: float, pressure_watched: Sequence[str] = ()) -> None:
        """`sequential_gb_per_s`: of the device profile, 0 when it was not measured."""
        self._engine = engine
        self._sequential_gb_per_s = sequential_gb_per_s
        self._pressure_watched = pressure_watched

    def now(self) -> weightd_pb2.StatsResponse:
        """The statistics of this moment. Raises _native.Stopping once the engine has ended."""
        stats = weightd_pb2.StatsResponse(
            **self._engine.stats(),
            io_engine=self._engine.io_engine,
            device_sequential_gb_per_s=self._sequential_gb_per_s,
            read_latency_bounds_s=_native.READ_LATENCY_BOUNDS_S,
            sessions_limit=_native.SESSIONS_MAX,
        )
        stats.models.sort(key=lambda model: model.name)
        stats.memory_pressure.watched.extend(self._pressure_watched)
        return stats
