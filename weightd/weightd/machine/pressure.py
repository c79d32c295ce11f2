"""Sets Linux' triggers for memory pressure (PSI, Documentation/accounting/psi.rst). The engine polls them.

A trigger is a descriptor of a pressure file to which a threshold was written. poll() returns POLLPRI when the threshold
is passed, at most once per window. The trigger of our own cgroup fires when a process under our memory limit waits for
memory. The trigger of the machine also fires when some other container is at its own limit, where our memory would not
help. So after a signal of the machine's trigger, the engine checks whether the machine itself is short of memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from flashclient.memory_limits import memory_directories

# Some task waited for memory during 100 ms of 2 s. Users without CAP_SYS_RESOURCE may only use windows that are
# multiples of 2 s.
THRESHOLD = b"some 100000 2000000\0"
NO_DESCRIPTOR = -1


@dataclass(frozen=True)
class Triggers:
    """The triggers that were set. The caller closes the descriptors."""

    machine_fd: int = NO_DESCRIPTOR
    cgroup_fd: int = NO_DESCRIPTOR
    watched: tuple[str, ...] = ()  # pressure files that are watched
    refused: tuple[str, ...] = ()  # for each other file, one line that says why not


def set_triggers(root: Path = Path("/")) -> Triggers:
    """Sets a trigger on each pressure file that exists and that we may watch."""
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
    """The pressure file of our own cgroup. None for the root cgroup, whose pressure is that of the machine."""
    own = next((directory for directory, version in memory_directories(root) if version == 2), None)
    return own / "memory.pressure" if own is not None and (own / "cgroup.type").exists() else None


def set_trigger(file: Path, threshold: bytes = THRESHOLD) -> int:
    """A descriptor that polls POLLPRI under pressure. OSError: the file is missing, PSI is off, or it is forbidden."""
    descriptor = os.open(file, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(descriptor, threshold)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
