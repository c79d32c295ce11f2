"""Memory pressure as Linux tells it: triggers of pressure stall information (PSI, Documentation/accounting/psi.rst).

A trigger is a descriptor of a pressure file to which a threshold was written; poll() then gives POLLPRI each time the
threshold is passed, once in a window at most. The engine polls them; here they are set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from weightd.budget import memory_directories

# Some task waited for memory during 100 ms of 2 s. Users without CAP_SYS_RESOURCE may name windows that are multiples
# of 2 s only.
THRESHOLD = b"some 100000 2000000\0"


@dataclass(frozen=True)
class Triggers:
    """What is listened to. Whoever takes the descriptors closes them."""

    descriptors: tuple[int, ...]
    watched: tuple[str, ...]  # the file of each
    refused: tuple[str, ...]  # one line for each file that cannot be watched


def pressure_files(root: Path = Path("/")) -> Iterator[Path]:
    """The machine's pressure file, then those of this process's cgroups, from its own up to the mount."""
    yield root / "proc/pressure/memory"
    for directory, version in memory_directories(root):
        file = directory / "memory.pressure"
        if version == 2 and (directory / "cgroup.type").exists():  # the hierarchy's root tells what the machine does
            yield file


def set_triggers(root: Path = Path("/")) -> Triggers:
    """A trigger on each pressure file that this kernel has and lets us watch."""
    descriptors: list[int] = []
    watched: list[str] = []
    refused: list[str] = []
    for file in pressure_files(root):
        try:
            descriptors.append(set_trigger(file))
            watched.append(str(file))
        except OSError as error:
            refused.append(f"{file}: {(error.strerror or str(error)).lower()}")
    return Triggers(tuple(descriptors), tuple(watched), tuple(refused))


def set_trigger(file: Path, threshold: bytes = THRESHOLD) -> int:
    """A descriptor that polls POLLPRI under pressure. Raises OSError: no such file, PSI is off, or it is forbidden."""
    descriptor = os.open(file, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(descriptor, threshold)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
