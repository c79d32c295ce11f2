"""The table of `weightd top`, computed from the statistics of two moments.

Rates are differences of counters divided by the time between. If the daemon has restarted in between, its counters are
compared with zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, TypeVar

from weightd.log import one_line
from weightd.sizes import format_size
from weightd_proto.weightd_pb2 import ModelStats, SessionStats, StatsResponse

BYTES_PER_GB = 1e9
INTERVAL_S_MIN = 1e-3

Row = TypeVar("Row")


@dataclass(frozen=True)
class ModelRow:
    """One model during the interval."""

    name: str
    sessions: int
    hit_rate: float | None  # None: no cell was requested
    reads_per_s: float
    gb_per_s: float  # over the whole interval
    gb_per_s_reading: float | None  # over the time in which at least one read was under way; None: no reads
    read_ms_p50: float | None
    read_ms_p99: float | None
    leases: int
    slots_leased: int
    slots_filled: int
    slots: int
    pool_bytes: int
    read_errors: int  # since the daemon's start
    verify_errors: int  # since the daemon's start


@dataclass(frozen=True)
class ClientRow:
    """One attached process during the interval."""

    session: int
    pid: int
    uid: int
    model: str
    hit_rate: float | None
    requests_per_s: float
    gb_per_s: float  # that were read for its misses
    leased_cells: int
    share_slots: int
    lease_limit: int
    age_s: float


@dataclass(frozen=True)
class View:
    """Everything that the screen shows."""

    interval_s: float
    io_engine: str
    dram_limit_bytes: int
    dram_target_bytes: int  # below the limit under memory pressure
    dram_pool_bytes: int
    dram_resident_bytes: int
    dram_tables_bytes: int
    sessions: int
    reads_in_flight: int
    reads_in_flight_max: int  # since the start
    reads_in_flight_limit: int
    reads_waiting: int
    device_sequential_gb_per_s: float  # 0: not measured
    models: tuple[ModelRow, ...]
    clients: tuple[ClientRow, ...]

    def as_json(self) -> dict[str, Any]:
        """The fields above, for --json."""
        return asdict(self)


def view_of(before: StatsResponse, after: StatsResponse) -> View:
    """What happened between two answers. If `before` is empty or from another daemon: since the daemon's start."""
    if after.uptime_s < before.uptime_s:
        before = StatsResponse()
    interval_s = max(after.uptime_s - before.uptime_s, INTERVAL_S_MIN)
    models = {model.name: model for model in before.models}
    clients = {client.session: client for client in before.attached}
    bounds_s = tuple(after.read_latency_bounds_s)
    return View(
        interval_s=interval_s,
        io_engine=after.io_engine,
        dram_limit_bytes=after.dram_limit_bytes,
        dram_target_bytes=after.memory_pressure.dram_target_bytes,
        dram_pool_bytes=after.dram_pool_bytes,
        dram_resident_bytes=after.dram_resident_bytes,
        dram_tables_bytes=after.dram_tables_bytes,
        sessions=after.sessions,
        reads_in_flight=after.read_queue.in_flight,
        reads_in_flight_max=after.read_queue.in_flight_max,
        reads_in_flight_limit=after.read_queue.depth_limit,
        reads_waiting=after.read_queue.waiting,
        device_sequential_gb_per_s=after.device_sequential_gb_per_s,
        models=tuple(
            _model_row(models.get(model.name, ModelStats()), model, interval_s, bounds_s) for model in after.models
        ),
        clients=tuple(
            _client_row(clients.get(client.session, SessionStats()), client, interval_s) for client in after.attached
        ),
    )


def _model_row(before: ModelStats, after: ModelStats, interval_s: float, bounds_s: Sequence[float]) -> ModelRow:
    read_bytes = after.read_bytes - before.read_bytes
    reading_s = after.reading_s - before.reading_s
    earlier = before.read_latency_counts or [0] * len(after.read_latency_counts)
    counts = [now - then for now, then in zip(after.read_latency_counts, earlier, strict=True)]
    return ModelRow(
        name=after.name,
        sessions=after.sessions,
        hit_rate=_share(after.hits - before.hits, after.misses - before.misses),
        reads_per_s=(after.reads - before.reads) / interval_s,
        gb_per_s=read_bytes / interval_s / BYTES_PER_GB,
        gb_per_s_reading=read_bytes / reading_s / BYTES_PER_GB if reading_s > 0 else None,
        read_ms_p50=_milliseconds(quantile(counts, bounds_s, 0.5)),
        read_ms_p99=_milliseconds(quantile(counts, bounds_s, 0.99)),
        leases=after.leases,
        slots_leased=after.slots_leased,
        slots_filled=after.slots_filled,
        slots=after.slots,
        pool_bytes=after.pool_bytes,
        read_errors=after.read_errors,
        verify_errors=after.verify_errors,
    )


def _client_row(before: SessionStats, after: SessionStats, interval_s: float) -> ClientRow:
    return ClientRow(
        session=after.session,
        pid=after.pid,
        uid=after.uid,
        model=after.model,
        hit_rate=_share(after.hits - before.hits, after.misses - before.misses),
        requests_per_s=(after.requests - before.requests) / interval_s,
        gb_per_s=(after.read_bytes - before.read_bytes) / interval_s / BYTES_PER_GB,
        leased_cells=after.leased_cells,
        share_slots=after.share_slots,
        lease_limit=after.lease_limit,
        age_s=after.age_s,
    )


def _share(hits: int, misses: int) -> float | None:
    return hits / (hits + misses) if hits + misses > 0 else None


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def quantile(counts: Sequence[int], bounds_s: Sequence[float], share: float) -> float | None:
    """The latency in seconds below which `share` of the reads lie, interpolated within its bucket. None: no reads.

    `counts` has one bucket more than `bounds_s`. A quantile in this last, open bucket is given as its lower bound.
    """
    wanted = share * sum(counts)
    if wanted <= 0:
        return None
    below = 0
    for (lower_s, upper_s), count in zip(pairwise([0.0, *bounds_s]), counts, strict=False):
        if below + count >= wanted:
            return lower_s + (upper_s - lower_s) * (wanted - below) / count
        below += count
    return bounds_s[-1]


# ---- as text ----

# A column: its heading, and its text in a row.
MODEL_COLUMNS: tuple[tuple[str, Callable[[ModelRow], str]], ...] = (
    ("MODEL", lambda row: one_line(row.name)),
    ("CLIENTS", lambda row: str(row.sessions)),
    ("HIT", lambda row: _percent(row.hit_rate)),
    ("GB/s", lambda row: f"{row.gb_per_s:.2f}"),
    ("READING", lambda row: "-" if row.gb_per_s_reading is None else f"{row.gb_per_s_reading:.2f}"),
    ("READS/s", lambda row: f"{row.reads_per_s:.0f}"),
    ("P50", lambda row: _time(row.read_ms_p50)),
    ("P99", lambda row: _time(row.read_ms_p99)),
    ("LEASES", lambda row: str(row.leases)),
    ("SLOTS", lambda row: f"{row.slots_filled}/{row.slots}"),
    ("POOL", lambda row: format_size(row.pool_bytes)),
    ("ERR", lambda row: str(row.read_errors + row.verify_errors)),
)
CLIENT_COLUMNS: tuple[tuple[str, Callable[[ClientRow], str]], ...] = (
    ("PID", lambda row: str(row.pid) if row.pid else "-"),
    ("UID", lambda row: str(row.uid)),
    ("CLIENT OF", lambda row: one_line(row.model)),
    ("HIT", lambda row: _percent(row.hit_rate)),
    ("GB/s", lambda row: f"{row.gb_per_s:.2f}"),
    ("REQ/s", lambda row: f"{row.requests_per_s:.0f}"),
    ("LEASED", lambda row: str(row.leased_cells)),
    ("SHARE", lambda row: str(row.share_slots)),
    ("LIMIT", lambda row: str(row.lease_limit)),
    ("AGE", lambda row: _age(row.age_s)),
)
LEFT_COLUMNS = ("MODEL", "CLIENT OF")


def lines_of(view: View) -> list[str]:
    """All lines of the screen, which Terminal cuts to its size."""
    return [
        *_head(view),
        "",
        *_table(MODEL_COLUMNS, view.models),
        "",
        *_table(CLIENT_COLUMNS, view.clients),
    ]


def _head(view: View) -> list[str]:
    used_bytes = view.dram_pool_bytes + view.dram_resident_bytes + view.dram_tables_bytes
    pressed = view.dram_target_bytes < view.dram_limit_bytes
    pressure = f", kept to {format_size(view.dram_target_bytes)} by memory pressure" if pressed else ""
    device = f", device {view.device_sequential_gb_per_s:.2f} GB/s" if view.device_sequential_gb_per_s else ""
    return [
        f"dram   {format_size(used_bytes)} of {format_size(view.dram_limit_bytes)}: pool "
        f"{format_size(view.dram_pool_bytes)}, resident {format_size(view.dram_resident_bytes)}, tables "
        f"{format_size(view.dram_tables_bytes)}{pressure}",
        f"reads  {view.reads_in_flight} in flight (most {view.reads_in_flight_max}, limit "
        f"{view.reads_in_flight_limit}), {view.reads_waiting} waiting, {one_line(view.io_engine)}{device}",
    ]


def _table(columns: Sequence[tuple[str, Callable[[Row], str]]], rows: Sequence[Row]) -> list[str]:
    headings = [heading for heading, _ in columns]
    lines = [headings, *([cell(row) for _, cell in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if heading in LEFT_COLUMNS else cell.rjust(width)
            for heading, cell, width in zip(headings, cells, widths, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [line(cells) for cells in lines]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _time(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "-"
    return f"{milliseconds * 1e3:.0f}us" if milliseconds < 1 else f"{milliseconds:.1f}ms"


def _age(seconds: float) -> str:
    for unit, unit_s in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f}{unit}"
    return f"{seconds:.0f}s"
