"""The limits on this process's memory: the machine's, and those of its memory cgroups.

The limit of each cgroup counts, from the process's own up to the root, in both cgroup versions. In version 2
memory.high counts as memory.max does: above it the kernel throttles the process until it hardly moves. Page cache that
the kernel would drop counts as free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes "no limit" as the largest page-aligned 64-bit number


@dataclass(frozen=True)
class MemoryLimit:
    """One bound on this process's memory: the machine's, or that of a cgroup."""

    source: str  # "the machine", or the cgroup's directory
    limit_bytes: int
    free_bytes: int


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """All bounds on this process's memory, the machine's first; `root` holds proc/ and the cgroup mounts."""
    return [_machine(root), *_cgroups(root)]


def tightest(limits: Sequence[MemoryLimit]) -> MemoryLimit:
    """The bound with the smallest limit."""
    return min(limits, key=lambda limit: limit.limit_bytes)


def free_bytes(limits: Sequence[MemoryLimit]) -> int:
    """How much more memory the process can take before it reaches one of `limits`."""
    return min(limit.free_bytes for limit in limits)


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
    """The cgroups that can bound this process's memory, each with its version, from its own up to each mount."""
    paths = _cgroup_paths(root)
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        mounted_root, mount_point = before.split()[3:5]
        version = _version(after)
        if version not in paths:
            continue
        mount = root / mount_point.lstrip("/")
        # In a container the root of the mount is the container's own cgroup: the rest of the path lies below the mount.
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
