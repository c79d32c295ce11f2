"""What --dram means within the memory limits of the machine and its cgroups."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from flashclient.memory_limits import MemoryLimit, free_bytes, memory_limits, tightest
from weightd.errors import SpaceError, UsageError
from weightd.sizes import NOTHING_GIVEN, Amount, format_enough, format_size

logger = logging.getLogger(__name__)

# The interpreter's promise (design, promise 1): what the process needs beside --dram.
INTERPRETER_BYTES = 150 << 20
DRAM_FLOOR = Amount(percent=50.0)  # of --dram


@dataclass(frozen=True)
class ModelDemand:
    """What one model asks of --dram."""

    name: str
    minimum_bytes: int  # the least with which it can be served
    full_bytes: int  # resident weights, every cell, the tables and room for a calibration: more is of no use


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
    if dram_bytes > (free := free_bytes(limits)):
        logger.warning("--dram %s is more than the %s free now", format_size(dram_bytes), format_size(free))
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
    half = max(0, free_bytes(limits) - INTERPRETER_BYTES) // 2
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
