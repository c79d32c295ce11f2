"""Chooses and checks --dram within the memory limits of the machine and its cgroups."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from flashclient.memory_limits import MemoryLimit, free_bytes, memory_limits, tightest
from weightd.errors import SpaceError, UsageError
from weightd.sizes import NOTHING_GIVEN, Amount, format_enough, format_size

logger = logging.getLogger(__name__)

# What the process needs beside --dram, at most.
INTERPRETER_BYTES = 150 << 20
DRAM_FLOOR = Amount(percent=50.0)  # of --dram


@dataclass(frozen=True)
class ModelDemand:
    """How much of --dram one model needs."""

    name: str
    minimum_bytes: int  # alone in a store it cannot be served with less
    full_bytes: int  # resident weights, every cell, tables and room for a calibration: it can use no more
    catalog_bytes: int = 0  # part of the minimum, which it takes beside other models even while nobody uses it


def minimum_beside(demand: ModelDemand, demands: Sequence[ModelDemand]) -> int:
    """With this much of --dram a model of a store can be served."""
    return demand.minimum_bytes + sum(other.catalog_bytes for other in demands if other != demand)


def chosen_dram_bytes(dram: Amount, demands: Sequence[ModelDemand]) -> int:
    """--dram in bytes, checked against the machine and the store's models. Raises SpaceError."""
    limits = memory_limits()
    if dram.bytes is not None:
        dram_bytes = dram.bytes
    elif dram.percent is not None:
        dram_bytes = percent_of_memory(dram.percent, limits)
    else:
        dram_bytes = default_dram_bytes(limits, demands)
    check_dram(dram_bytes, limits, demands, dram.percent)
    for demand in unservable(dram_bytes, demands):
        logger.warning(
            "%s cannot be served: it needs --dram %s", demand.name, format_enough(minimum_beside(demand, demands))
        )
    if dram_bytes > (free := free_bytes(limits)):
        logger.warning("--dram %s is more than the %s free now", format_size(dram_bytes), format_size(free))
    return dram_bytes


def chosen_floor_bytes(floor: Amount, dram_bytes: int) -> int:
    """--dram-floor in bytes. Raises UsageError if it is above --dram."""
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
    """Half of the free memory, but no more than the models need. For an empty store just half."""
    half = max(0, free_bytes(limits) - INTERPRETER_BYTES) // 2
    needed = sum(demand.full_bytes for demand in demands)
    return min(half, needed) if demands else half


class GrowingDram:
    """The default --dram. It grows with every model that is imported while weightd serves."""

    def __init__(self, dram: Amount, floor: Amount, dram_bytes: int, demands: Sequence[ModelDemand]) -> None:
        """`dram`, `floor`: as the user gave them. `dram_bytes`: chosen at the start for the models of `demands`."""
        self._floor = floor
        self.dram_bytes = dram_bytes
        self._lock = threading.Lock()  # models are opened in several threads
        self._known = {demand.name for demand in demands}
        # With an empty store, --dram is half of the free memory from the start.
        self._grows = dram == NOTHING_GIVEN and bool(demands)

    def with_model(self, demand: ModelDemand) -> tuple[int, int]:
        """--dram and its floor in bytes after one more model: more by its demand, but by no more than half of what is
        free."""
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
    """Raises SpaceError if the limits do not allow `dram_bytes`, or if no model can be served with it.

    `percent`: the percentage that the user gave, if it was one. The error then suggests a percentage, too.
    """
    bound = tightest(limits)
    if dram_bytes + INTERPRETER_BYTES > bound.limit_bytes:
        given = format_size(dram_bytes) if percent is None else f"{percent:g}% (of {format_size(bound.limit_bytes)})"
        raise SpaceError(
            f"--dram {given} and {format_size(INTERPRETER_BYTES)} for the interpreter are more than the "
            f"{format_size(bound.limit_bytes)} of {bound.source}; {_most(bound.limit_bytes, percent is not None)}"
        )
    check_serves_one(dram_bytes, demands)


def check_serves_one(dram_bytes: int, demands: Sequence[ModelDemand]) -> None:
    """Raises SpaceError if there are models, and none can be served with `dram_bytes`."""
    if demands and len(unservable(dram_bytes, demands)) == len(demands):
        raise SpaceError(f"--dram {format_size(dram_bytes)} is too small: {_minimums(demands)}")


def unservable(dram_bytes: int, demands: Sequence[ModelDemand]) -> list[ModelDemand]:
    """The models that need more than `dram_bytes`, beside what the others take."""
    return [demand for demand in demands if minimum_beside(demand, demands) > dram_bytes]


def _most(limit_bytes: int, as_percent: bool) -> str:
    """The largest --dram that is accepted, as advice."""
    most_bytes = limit_bytes - INTERPRETER_BYTES
    if as_percent and most_bytes * 100 >= limit_bytes:
        return f"give at most --dram {most_bytes * 100 // limit_bytes}%"
    if most_bytes >= 1 << 20:
        return f"give at most --dram {most_bytes >> 20}MiB"
    return "raise that limit"


def _minimums(demands: Sequence[ModelDemand]) -> str:
    return "; ".join(
        f"{demand.name} needs at least {format_enough(minimum_beside(demand, demands))} "
        "(resident weights, tables, a few cells)"
        for demand in demands
    )
