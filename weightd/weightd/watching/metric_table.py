"""Every metric that `weightd --metrics` serves: the only place where their names, labels and meanings are written.

Units are in the names, as Prometheus wants them: bytes, seconds, and counters end in `_total` and count from the
daemon's start. Rates, hit rates and achieved bandwidth are quotients of them:

    hit rate        rate(weightd_cell_hits_total[5m]) / (rate(weightd_cell_hits_total[5m]) +
                    rate(weightd_cell_misses_total[5m]))
    achieved bytes  rate(weightd_read_bytes_total[5m]) / rate(weightd_reading_seconds_total[5m])
    read p99        histogram_quantile(0.99, rate(weightd_read_latency_seconds_bucket[5m]))

Beside these stand the `process_*` metrics of prometheus_client (CPU seconds, resident memory, descriptors, start time).
Resident memory there includes the pool, which is shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from weightd_proto.weightd_pb2 import ModelStats, StatsResponse

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
BYTES_PER_GB = 1e9


@dataclass(frozen=True)
class Buckets:
    """The value of a histogram: requests by upper bound in seconds (not summed up; the last has none)."""

    bounds_s: tuple[float, ...]
    counts: tuple[int, ...]
    sum_s: float


Sample = tuple[tuple[str, ...], float | Buckets]  # the labels' values, and the value


@dataclass(frozen=True)
class Metric:
    """One metric and how it is read from the daemon's statistics."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...]
    samples: Callable[[StatsResponse], Iterator[Sample]]


def _one(name: str, kind: str, text: str, value: Callable[[StatsResponse], float]) -> Metric:
    return Metric(name, kind, text, (), lambda stats: iter([((), value(stats))]))


def _by_model(name: str, kind: str, text: str, value: Callable[[ModelStats], float]) -> Metric:
    def samples(stats: StatsResponse) -> Iterator[Sample]:
        return (((model.name,), value(model)) for model in stats.models)

    return Metric(name, kind, text, ("model",), samples)


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


def _info(stats: StatsResponse) -> Iterator[Sample]:
    yield (stats.io_engine,), 1.0


METRICS: tuple[Metric, ...] = (
    Metric(
        "weightd_info", GAUGE, "Always 1; io_engine is the level at which the device is read.", ("io_engine",), _info
    ),
    # memory against the cap
    _one("weightd_dram_limit_bytes", GAUGE, "The cap, --dram.", lambda s: s.dram_limit_bytes),
    Metric("weightd_dram_bytes", GAUGE, "Memory in use, by kind: pool, resident, tables.", ("kind",), _dram),
    _one(
        "weightd_dram_target_bytes",
        GAUGE,
        "What weightd keeps to now: the cap, or less while the system lacks memory.",
        lambda s: s.memory_pressure.dram_target_bytes,
    ),
    _one(
        "weightd_dram_floor_bytes",
        GAUGE,
        "Memory pressure takes no more than down to this, --dram-floor.",
        lambda s: s.memory_pressure.dram_floor_bytes,
    ),
    _one(
        "weightd_memory_pressure",
        GAUGE,
        "1 while the pool is kept smaller than the cap, because the system lacks memory.",
        lambda s: s.memory_pressure.pressed,
    ),
    _one(
        "weightd_memory_pressure_signals_total",
        COUNTER,
        "Times the kernel told of memory pressure.",
        lambda s: s.memory_pressure.signals,
    ),
    # sessions and leases
    _by_model("weightd_sessions", GAUGE, "Attached processes.", lambda m: m.sessions),
    _one("weightd_sessions_limit", GAUGE, "Sessions that can be open at once.", lambda s: s.sessions_limit),
    _by_model("weightd_leases", GAUGE, "Leases of all sessions; two on one slot count twice.", lambda m: m.leases),
    _by_model("weightd_slots", GAUGE, "Slots in the pool; a slot holds one cell.", lambda m: m.slots),
    _by_model("weightd_slots_filled", GAUGE, "Slots that hold a cell.", lambda m: m.slots_filled),
    _by_model("weightd_slots_leased", GAUGE, "Slots that are leased or being read.", lambda m: m.slots_leased),
    _by_model("weightd_slots_guaranteed", GAUGE, "Shares of all sessions together.", lambda m: m.guaranteed_slots),
    _by_model("weightd_pool_bytes", GAUGE, "Bytes of the pool's segments.", lambda m: m.pool_bytes),
    # what is asked of the pool
    _by_model("weightd_cell_hits_total", COUNTER, "Cells found in the pool, or on their way there.", lambda m: m.hits),
    _by_model("weightd_cell_misses_total", COUNTER, "Cells that had to be read from flash.", lambda m: m.misses),
    _by_model("weightd_evictions_total", COUNTER, "Cells that gave way to others.", lambda m: m.evictions),
    # what is asked of the device
    _by_model("weightd_reads_total", COUNTER, "Read requests for bundles.", lambda m: m.reads),
    _by_model("weightd_read_bytes_total", COUNTER, "Bytes of bundles read.", lambda m: m.read_bytes),
    _by_model(
        "weightd_reading_seconds_total",
        COUNTER,
        "Time in which at least one read was under way; bytes over it is the achieved bandwidth.",
        lambda m: m.reading_s,
    ),
    Metric(
        "weightd_read_latency_seconds",
        HISTOGRAM,
        "Time of a read request, from the device's being asked to its answer; waiting for a free place is not in it.",
        ("model",),
        _latency,
    ),
    Metric(
        "weightd_region_reads_total",
        COUNTER,
        "Read requests by region: equal parts of bundles.bin, in order, for wear.",
        ("model", "region"),
        _regions,
    ),
    _by_model(
        "weightd_read_errors_total", COUNTER, "Cells that the device failed to give, twice.", lambda m: m.read_errors
    ),
    _by_model(
        "weightd_verify_errors_total",
        COUNTER,
        "Cells that differ from their checksum, twice.",
        lambda m: m.verify_errors,
    ),
    _one("weightd_reads_in_flight", GAUGE, "Read requests at the device.", lambda s: s.read_queue.in_flight),
    _one(
        "weightd_reads_in_flight_max",
        GAUGE,
        "The most read requests at the device at once since the start.",
        lambda s: s.read_queue.in_flight_max,
    ),
    _one(
        "weightd_reads_in_flight_limit",
        GAUGE,
        "Read requests that may be at the device at once: --io-depth or --io-threads.",
        lambda s: s.read_queue.depth_limit,
    ),
    _one(
        "weightd_reads_waiting",
        GAUGE,
        "Read requests that wait for a place at the device.",
        lambda s: s.read_queue.waiting,
    ),
    _one(
        "weightd_device_sequential_bytes_per_second",
        GAUGE,
        "The device's sequential speed, as measured by doctor; 0 when it was not.",
        lambda s: s.device_sequential_gb_per_s * BYTES_PER_GB,
    ),
)
