"""What the machine and its memory cgroups can give, and what --dram means in it.

The smallest limit on the way from this process's cgroup up to the root counts, in both cgroup versions, beside the
machine's own memory. Page cache that the kernel would drop is free memory.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightd.errors import SpaceError, UsageError
from weightd.sizes import NOTHING_GIVEN, Amount, format_enough, format_size

logger = logging.getLogger(__name__)

# The interpreter's promise (design, promise 1): what the process needs beside --dram.
INTERPRETER_BYTES = 150 << 20
# cgroup v1 writes "no limit" as the largest page-aligned 64-bit number.
UNLIMITED_BYTES = 1 << 60
DRAM_FLOOR = Amount(percent=50.0)  # of --dram


@dataclass(frozen=True)
class MemoryLimit:
    """One bound on this process's memory: the machine's, or that of a cgroup."""

    source: str  # "the machine", or the cgroup's directory
    limit_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class ModelDemand:
    """What one model asks of --dram."""

    name: str
    minimum_bytes: int  # the least with which it can be served
    full_bytes: int  # resident weights, every cell, the tables and room for a calibration: more is of no use


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """All bounds on this process's memory, the machine's first; `root` holds proc/ and the cgroup mounts."""
    return [_machine(root), *_cgroups(root)]


def tightest(limits: Sequence[MemoryLimit]) -> MemoryLimit:
    """The bound with the smallest limit."""
    return min(limits, key=lambda limit: limit.limit_bytes)


def chosen_dram_bytes(dram: Amount, demands: Sequence[ModelDemand]) -> int:
    """What --dram is in bytes, checked against the machine and the store's models. Raises SpaceError."""
    limits = memory_limits()
    if dram.bytes is not None:
        dram_bytes = dram.bytes
    elif dram.percent is not None:
        dram_bytes = percent_of_memory(dram.percent, limits)
    else:
        dram_bytes = default_dram_bytes(limits, demands)
    check_dram(dram_bytes, limits, demands, dram.percent)
    for demand in unservable(dram_bytes, demands):
        logger.warning("%s cannot be served: it needs --dram %s", demand.name, format_enough(demand.minimum_bytes))
    free_bytes = min(limit.free_bytes for limit in limits)
    if dram_bytes > free_bytes:
        logger.warning("--dram %s is more than the %s free now", format_size(dram_bytes), format_size(free_bytes))
    return dram_bytes


def chosen_floor_bytes(floor: Amount, dram_bytes: int) -> int:
    """What --dram-floor is in bytes. Raises UsageError for one above --dram."""
    if floor.percent is not None:
        return int(dram_bytes * floor.percent / 100)
    assert floor.bytes is not None
    if floor.bytes > dram_bytes:
        raise UsageError(
            f"--dram-floor {format_size(floor.bytes)} is above --dram {format_size(dram_bytes)}; "
            "give a smaller one, or a percentage"
        )
    return floor.bytes


def default_dram_bytes(limits: Sequence[MemoryLimit], demands: Sequence[ModelDemand]) -> int:
    """Half of what machine and cgroups leave free, no more than the models need (an empty store: just half)."""
    half = max(0, min(limit.free_bytes for limit in limits) - INTERPRETER_BYTES) // 2
    needed = sum(demand.full_bytes for demand in demands)
    return min(half, needed) if demands else half


class GrowingDram:
    """--dram where none was given: it grows with the models that are imported while weightd serves."""

    def __init__(self, dram: Amount, floor: Amount, dram_bytes: int, demands: Sequence[ModelDemand]) -> None:
        """`dram`, `floor`: as given. `dram_bytes`, `demands`: what was chosen at the start, and for which models."""
        self._floor = floor
        self.dram_bytes = dram_bytes
        self._lock = threading.Lock()  # models are opened in several threads
        self._known = {demand.name for demand in demands}
        # An empty store had no bound but what was free.
        self._grows = dram == NOTHING_GIVEN and bool(demands)

    def with_model(self, demand: ModelDemand) -> tuple[int, int]:
        """--dram and its floor in bytes, now that this model is served, too: more by what it needs, but no more than
        half of what is free."""
        with self._lock:
            if self._grows and demand.name not in self._known:
                self._known.add(demand.name)
                self.dram_bytes += default_dram_bytes(memory_limits(), [demand])
            return self.dram_bytes, chosen_floor_bytes(self._floor, self.dram_bytes)


def percent_of_memory(percent: float, limits: Sequence[MemoryLimit]) -> int:
    """`percent` of the tightest limit, in bytes."""
    return int(tightest(limits).limit_bytes * percent / 100)


def check_dram(
    dram_bytes: int, limits: Sequence[MemoryLimit], demands: Sequence[ModelDemand], percent: float | None = None
) -> None:
    """Raises SpaceError when no process of this machine can hold `dram_bytes`, or no model can be served with it.

    `percent`: how that was given, if it was a percentage; what is to be given instead is one, too.
    """
    bound = tightest(limits)
    if dram_bytes + INTERPRETER_BYTES > bound.limit_bytes:
        given = format_size(dram_bytes) if percent is None else f"{percent:g}% (of {format_size(bound.limit_bytes)})"
        raise SpaceError(
            f"--dram {given} and {format_size(INTERPRETER_BYTES)} for the interpreter are more than the "
            f"{format_size(bound.limit_bytes)} of {bound.source}; {_most(bound.limit_bytes, percent is not None)}"
        )
    if demands and all(demand.minimum_bytes > dram_bytes for demand in demands):
        raise SpaceError(f"--dram {format_size(dram_bytes)} is too small: {_minimums(demands)}")


def unservable(dram_bytes: int, demands: Sequence[ModelDemand]) -> list[ModelDemand]:
    """The models that need more than `dram_bytes`."""
    return [demand for demand in demands if demand.minimum_bytes > dram_bytes]


def _most(limit_bytes: int, as_percent: bool) -> str:
    """What to try, rounded down so that it is taken."""
    most_bytes = limit_bytes - INTERPRETER_BYTES
    if as_percent and most_bytes * 100 >= limit_bytes:
        return f"give at most --dram {most_bytes * 100 // limit_bytes}%"
    if most_bytes >= 1 << 20:
        return f"give at most --dram {most_bytes >> 20}MiB"
    return "raise that limit"


def _minimums(demands: Sequence[ModelDemand]) -> str:
    return "; ".join(
        f"{demand.name} needs at least {format_enough(demand.minimum_bytes)} (resident weights, tables, a few cells)"
        for demand in demands
    )


def _machine(root: Path) -> MemoryLimit:
    fields: dict[str, int] = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) << 10  # kB
    return MemoryLimit("the machine", fields["MemTotal"], fields["MemAvailable"])


def _cgroups(root: Path) -> Iterator[MemoryLimit]:
    for directory, version in memory_directories(root):
        limit = _limit_v2(directory) if version == 2 else _limit_v1(directory)
        if limit is not None:
            yield limit


def memory_directories(root: Path) -> Iterator[tuple[Path, int]]:
    """This process's cgroups that can bound memory and their version, from its own up to each mount."""
    paths = _cgroup_paths(root)
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        mounted_root, mount_point = before.split()[3:5]
        version = _version(after)
        if version not in paths:
            continue
        mount = root / mount_point.lstrip("/")
        # A container sees a mount whose root is its own cgroup: the path below the mount is what is left.
        below = paths[version].removeprefix(mounted_root.rstrip("/")).strip("/")
        directory = mount / below if (mount / below).is_dir() else mount
        yield directory, version
        while directory != mount:
            directory = directory.parent
            yield directory, version


def _version(mount: str) -> int:
    """The cgroup version that can bound memory on this mount ("type source options"); 0 when none can."""
    kind, _, options = mount.split()[:3]
    if kind == "cgroup2":
        return 2
    return 1 if kind == "cgroup" and "memory" in options.split(",") else 0


def _cgroup_paths(root: Path) -> dict[int, str]:
    """The process's path in the unified hierarchy (2) and in the v1 memory hierarchy (1)."""
    paths: dict[int, str] = {}
    file = root / "proc/self/cgroup"
    for line in file.read_text().splitlines() if file.exists() else []:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            paths[2] = path
        elif "memory" in controllers.split(","):
            paths[1] = path
    return paths


def _limit_v2(directory: Path) -> MemoryLimit | None:
    # Above memory.high a process is throttled until it hardly moves, so it bounds as memory.max does.
    limits = [_number(directory / name) for name in ("memory.max", "memory.high")]
    known = [limit for limit in limits if limit is not None]
    used = _number(directory / "memory.current")
    if not known or used is None:
        return None
    return _limit(directory, min(known), used, "inactive_file")


def _limit_v1(directory: Path) -> MemoryLimit | None:
    limit = _number(directory / "memory.limit_in_bytes")
    used = _number(directory / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= UNLIMITED_BYTES:
        return None
    return _limit(directory, limit, used, "total_inactive_file")


def _limit(directory: Path, limit_bytes: int, used_bytes: int, reclaimable: str) -> MemoryLimit:
    used_bytes -= _statistic(directory / "memory.stat", reclaimable)
    return MemoryLimit(str(directory), limit_bytes, max(0, limit_bytes - used_bytes))


def _number(file: Path) -> int | None:
    """The number in `file`; None when there is no such file or it says "max"."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return None if text == "max" else int(text)


def _statistic(file: Path, name: str) -> int:
    for line in file.read_text().splitlines() if file.exists() else []:
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
