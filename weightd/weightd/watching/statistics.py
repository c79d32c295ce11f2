"""The daemon's statistics as one message: what Stats answers, `--metrics` serves and `weightd top` shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

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
        models = _by_name(stats.models)
        del stats.models[:]
        stats.models.extend(models)
        stats.memory_pressure.watched.extend(self._pressure_watched)
        return stats


def _by_name(models: Iterable[weightd_pb2.ModelStats]) -> list[weightd_pb2.ModelStats]:
    """Sums of all imports of a model: one that was replaced may still be in use, and its counts stay."""
    sums: dict[str, weightd_pb2.ModelStats] = {}
    for model in models:
        total = sums.setdefault(model.name, weightd_pb2.ModelStats(name=model.name))
        for field, value in model.ListFields():
            if field.is_repeated:
                before = getattr(total, field.name)
                before[:] = [sum(pair) for pair in zip_longest(before, value, fillvalue=0)]
            elif field.name != "name":
                setattr(total, field.name, getattr(total, field.name) + value)
    return [sums[name] for name in sorted(sums)]
