"""Memory pressure as Linux tells it: triggers of pressure stall information (PSI, Documentation/accounting/psi.rst).

A trigger is a descriptor of a pressure file to which a threshold was written; poll() then gives POLLPRI each time the
threshold is passed, once in a window at most. Here they are set; the engine polls them. That of our own cgroup tells
that we, or who shares our limit, wait for memory. That of the machine also speaks when some container alone is at its
limit, which nobody else can help: so the engine looks whether the machine itself is short of memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from flashclient.memory_limits import memory_directories

# Some task waited for memory during 100 ms of 2 s. Users without CAP_SYS_RESOURCE may name windows that are multiples
# of 2 s only.
THRESHOLD = b"some 100000 2000000\0"
NO_DESCRIPTOR = -1


@dataclass(frozen=True)
class Triggers:
    """What is listened to. Whoever takes the descriptors closes them."""

    machine_fd: int = NO_DESCRIPTOR
    cgroup_fd: int = NO_DESCRIPTOR
    watched: tuple[str, ...] = ()  # their files
    refused: tuple[str, ...] = ()  # one line for each file that cannot be watched


def set_triggers(root: Path = Path("/")) -> Triggers:
    """A trigger on each pressure file that this kernel has and lets us watch."""
    descriptors: list[int] = []
    watched: list[str] = []
    refused: list[str] = []
    for file in (root / "proc/pressure/memory", cgroup_file(root)):
        descriptor = NO_DESCRIPTOR
        if file is not None:
            try:
                descriptor = set_trigger(file)
                watched.append(str(file))
            except OSError as error:
                refused.append(f"{file}: {(error.strerror or str(error)).lower()}")
        descriptors.append(descriptor)
    return Triggers(descriptors[0], descriptors[1], tuple(watched), tuple(refused))


def cgroup_file(root: Path = Path("/")) -> Path | None:
    """The pressure file of our own cgroup; none in the hierarchy's root, which tells what the machine does."""
    own = next((directory for directory, version in memory_directories(root) if version == 2), None)
    return own / "memory.pressure" if own is not None and (own / "cgroup.type").exists() else None


def set_trigger(file: Path, threshold: bytes = THRESHOLD) -> int:
    """A descriptor that polls POLLPRI under pressure. Raises OSError: no such file, PSI is off, or it is forbidden."""
    descriptor = os.open(file, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(descriptor, threshold)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
