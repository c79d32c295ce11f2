"""Memory pressure that really happens: a process that reads more of a file than its memory cgroup can hold, in a cgroup
of the unified hierarchy whose pressure another process watches. Tests are skipped where no such cgroups may be made."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from memory_cgroup import memory_cgroup

MEMORY_BYTES = 24 << 20  # of the reader: its interpreter and some page cache
FILE_BYTES = 40 << 20  # near enough to it that what is dropped is wanted again soon, which is what stalls
READER = """
import os, random, sys
file = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)  # what others have cached is not charged to us
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
pages = os.fstat(file).st_size // 4096
while True:
    os.pread(file, 4096, random.randrange(pages) * 4096)
"""


@dataclass(frozen=True)
class PressureCgroup:
    """A cgroup in whose name the kernel counts stalls."""

    folder: Path

    @property
    def pressure_file(self) -> Path:
        return self.folder / "memory.pressure"

    @property
    def prefix(self) -> tuple[str, ...]:
        """What a command is started with to run inside."""
        return ("sh", "-c", f'echo $$ > {self.folder}/cgroup.procs && exec "$@"', "sh")


@contextmanager
def pressure_cgroup() -> Iterator[PressureCgroup]:
    """A cgroup of the unified hierarchy, gone at the end."""
    folder = _unified() / f"weightd-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        if not (folder / "memory.pressure").exists():
            pytest.skip("this kernel tells nothing of the memory pressure of cgroups")
        yield PressureCgroup(folder)
    finally:
        os.rmdir(folder)  # noqa: PTH106 - a cgroup's folder is removed with its files in it


@contextmanager
def pressed(file: Path, inside: PressureCgroup | None = None) -> Iterator[None]:
    """Pressure while it is entered, by reading `file`, which is written first; counted for `inside` and the machine."""
    with file.open("wb") as written:
        for _ in range(FILE_BYTES >> 20):
            written.write(os.urandom(1 << 20))
        os.fsync(written.fileno())
    with memory_cgroup(MEMORY_BYTES) as capped:
        if capped.version == 2 and inside is not None:
            pytest.skip("one hierarchy: a process is in the capped cgroup or in the one that is watched, not in both")
        prefix = [*capped.prefix, *(() if inside is None else inside.prefix)]
        process = subprocess.Popen([*prefix, sys.executable, "-c", READER, str(file)])
        try:
            yield
        finally:
            process.kill()
            process.wait()


def _unified() -> Path:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            return Path(before.split()[4])
    pytest.skip("there is no unified cgroup hierarchy")
