"""The report of a benchmark: facts about the machine, rows, targets, and runs in ABBA order.

With --json every bench_*.py prints one object: {"machine": {...}, "rows": [...], "targets": [{"name", "value", "unit",
"target", "better", "met"}]}. Values that are compared come from the same run.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

Result = TypeVar("Result")
Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A value that was measured, and the value that it should reach."""

    name: str
    value: float
    unit: str
    target: float
    better: Literal["higher", "lower"]

    @property
    def met(self) -> bool:
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


def abba(first: Callable[[], Result], second: Callable[[], Result], rounds: int) -> tuple[list[Result], list[Result]]:
    """Runs both in the order first, second, second, first, `rounds` times, so that a slow drift affects both alike."""
    results: tuple[list[Result], list[Result]] = ([], [])
    for _ in range(rounds):
        for which in (0, 1, 1, 0):
            results[which].append((first, second)[which]())
    return results


def middle(results: Sequence[Result], value: Callable[[Result], float]) -> float:
    """The median of a value of each result."""
    return median(value(result) for result in results)


def machine_facts(folder: Path) -> Row:
    """The machine on which a row was measured; `folder`: on the device that was read."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpu[0].partition(": ")[2] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "file_system_block_bytes": os.statvfs(folder).f_bsize,
        "load_before": os.getloadavg()[0],
    }


def report(machine: Row, rows: Sequence[Row], targets: Sequence[Target], as_json: bool) -> None:
    """Prints the results as JSON or as a table."""
    if as_json:
        told = [asdict(target) | {"met": target.met} for target in targets]
        print(json.dumps({"machine": machine, "rows": list(rows), "targets": told}))
        return
    for row in rows:
        print("  ".join(f"{name} {_short(value)}" for name, value in row.items()))
    for target in targets:
        sign = ">=" if target.better == "higher" else "<="
        verdict = "met" if target.met else "NOT MET"
        print(f"{target.name}: {_short(target.value)} {target.unit} ({sign} {target.target}: {verdict})")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
