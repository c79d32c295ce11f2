"""A memory cgroup of version 1 or 2, to start a process in."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MemoryCgroup:
    folder: Path
    version: int

    @property
    def prefix(self) -> tuple[str, ...]:
        """Put it before a command to run the command inside the cgroup."""
        return ("sh", "-c", f'echo $$ > {self.folder}/cgroup.procs && exec "$@"', "sh")

    @property
    def peak_bytes(self) -> int:
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        return int((self.folder / name).read_text())

    @property
    def kills(self) -> int:
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        counts = dict(line.split() for line in (self.folder / name).read_text().splitlines())
        return int(counts["oom_kill"])


@contextmanager
def capped_memory(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """Makes a cgroup whose processes may use `limit_bytes`, page cache included. OSError if that is not allowed."""
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    version = 1 if first.is_dir() else 2
    folder = (first if version == 1 else second) / f"weightd-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        limit = folder / ("memory.limit_in_bytes" if version == 1 else "memory.max")
        limit.write_text(str(limit_bytes))
        yield MemoryCgroup(folder, version)
    finally:
        os.rmdir(folder)  # noqa: PTH106 - a cgroup's folder is removed with its files in it
