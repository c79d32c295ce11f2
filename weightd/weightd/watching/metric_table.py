"""Every metric that `weightd --metrics` serves.

A single number is described by its field in proto/weightd.proto, which carries the metric's name and help as the option
`metric`. This module collects those fields and adds the metrics that are made of several values. Units are part of the
names, as Prometheus recommends: bytes, seconds, and `_total` for counters since the daemon's start. Hit rate, bandwidth
and latency are quotients of them:

    hit rate        rate(weightd_cell_hits_total[5m]) / (rate(weightd_cell_hits_total[5m]) +
                    rate(weightd_cell_misses_total[5m]))
    achieved bytes  rate(weightd_read_bytes_total[5m]) / rate(weightd_reading_seconds_total[5m])
    read p99        histogram_quantile(0.99, rate(weightd_read_latency_seconds_bucket[5m]))

prometheus_client adds the `process_*` metrics (CPU seconds, resident memory, descriptors, start time). Resident memory
there includes the pool, which is shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from weightd_proto import weightd_pb2
from weightd_proto.weightd_pb2 import MemoryPressure, ModelStats, ReadQueue, StatsResponse

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
BYTES_PER_GB = 1e9


@dataclass(frozen=True)
class Buckets:
    """The value of a histogram: requests by upper bound in seconds (not cumulative; the last bucket has no bound)."""

    bounds_s: tuple[float, ...]
    counts: tuple[int, ...]
    sum_s: float


Sample = tuple[tuple[str, ...], float | Buckets]  # the labels' values, and the value


@dataclass(frozen=True)
class Metric:
    """One metric, and how its samples are read from the daemon's statistics."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...]
    samples: Callable[[StatsResponse], Iterator[Sample]]


def _fields(message: type[StatsResponse | MemoryPressure | ReadQueue | ModelStats]) -> Iterator[Any]:
    """The fields of a message that carry the option `metric`."""
    return (field for field in message.DESCRIPTOR.fields if _option(field).name)


def _option(field: Any) -> weightd_pb2.Metric:
    """Empty for a field that is no metric."""
    option: weightd_pb2.Metric = field.GetOptions().Extensions[weightd_pb2.metric]
    return option


def _described(field: Any, labels: tuple[str, ...], samples: Callable[[StatsResponse], Iterator[Sample]]) -> Metric:
    option = _option(field)
    return Metric(option.name, COUNTER if option.name.endswith("_total") else GAUGE, option.help, labels, samples)


def _of_daemon(field: Any, part: Callable[[StatsResponse], StatsResponse | MemoryPressure | ReadQueue]) -> Metric:
    return _described(field, (), lambda stats: iter([((), getattr(part(stats), field.name))]))


def _by_model(field: Any) -> Metric:
    def samples(stats: StatsResponse) -> Iterator[Sample]:
        return (((model.name,), getattr(model, field.name)) for model in stats.models)

    return _described(field, ("model",), samples)


def _info(stats: StatsResponse) -> Iterator[Sample]:
    yield (stats.io_engine,), 1.0


def _dram(stats: StatsResponse) -> Iterator[Sample]:
    yield ("pool",), stats.dram_pool_bytes
    yield ("resident",), stats.dram_resident_bytes
    yield ("tables",), stats.dram_tables_bytes


def _latency(stats: StatsResponse) -> Iterator[Sample]:
    bounds_s = tuple(stats.read_latency_bounds_s)
    for model in stats.models:
        yield (model.name,), Buckets(bounds_s, tuple(model.read_latency_counts), model.read_latency_sum_s)


def _regions(stats: StatsResponse) -> Iterator[Sample]:
    for model in stats.models:
        for region, reads in enumerate(model.region_reads):
            yield (model.name, str(region)), reads


def _sequential(stats: StatsResponse) -> Iterator[Sample]:
    yield (), stats.device_sequential_gb_per_s * BYTES_PER_GB


METRICS: tuple[Metric, ...] = (
    Metric("weightd_info", GAUGE, "Always 1; io_engine says how the device is read.", ("io_engine",), _info),
    *(_of_daemon(field, lambda stats: stats) for field in _fields(StatsResponse)),
    *(_of_daemon(field, lambda stats: stats.memory_pressure) for field in _fields(MemoryPressure)),
    *(_of_daemon(field, lambda stats: stats.read_queue) for field in _fields(ReadQueue)),
    *(_by_model(field) for field in _fields(ModelStats)),
    Metric("weightd_dram_bytes", GAUGE, "Memory in use, by kind: pool, resident, tables.", ("kind",), _dram),
    Metric(
        "weightd_read_latency_seconds",
        HISTOGRAM,
        "Time of a read request at the device, without the time in which it waited to be submitted.",
        ("model",),
        _latency,
    ),
    Metric(
        "weightd_region_reads_total",
        COUNTER,
        "Read requests by region (equal parts of bundles.bin, in order). They show where the device wears.",
        ("model", "region"),
        _regions,
    ),
    Metric(
        "weightd_device_sequential_bytes_per_second",
        GAUGE,
        "The device's sequential speed, as measured by `weightd doctor`; 0 if it was not measured.",
        (),
        _sequential,
    ),
)
