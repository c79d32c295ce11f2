"""Memory that this process may still take: the machine's, or what the limits of its memory cgroups leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# By the kind of the file system that a hierarchy is mounted as: limit, use, and what of that the kernel would drop.
FILES = {
    "cgroup2": ("memory.max", "memory.current", "inactive_file"),
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes(root: Path = Path("/")) -> int:
    """The least of all bounds, at least 0; `root` holds proc/ and the cgroup mounts, of version 1, 2 or both."""
    fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    free_bytes = [int(fields["MemAvailable"].split()[0]) * 1024]
    for kind, folder in _cgroups(root):
        limit_name, used_name, droppable = FILES[kind]
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        if limit is not None and used is not None:
            free_bytes.append(limit - used + _statistics(folder / "memory.stat").get(droppable, 0))
    return max(0, min(free_bytes))


def _cgroups(root: Path) -> Iterator[tuple[str, Path]]:
    """Kind and folder of every cgroup that can bound our memory: our own, and those above it up to the mount."""
    ours = _paths(root)
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        mounted_root, mount_point = before.split()[3:5]
        kind, _, options = after.split()[:3]
        bounds = kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(","))
        if not bounds or kind not in ours:
            continue
        mount = root / mount_point.lstrip("/")
        # A container sees a mount whose root is its own cgroup: the path below the mount is what is left.
        folder = mount / ours[kind].removeprefix(mounted_root.rstrip("/")).strip("/")
        while folder.is_relative_to(mount):
            yield kind, folder
            folder = folder.parent


def _paths(root: Path) -> dict[str, str]:
    """Our cgroup's path in the unified hierarchy and in that of version 1's memory controller."""
    paths: dict[str, str] = {}
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    return paths


def _number(file: Path) -> int | None:
    """The number in `file`; None where there is none, or no limit."""
    text = file.read_text().strip() if file.exists() else "max"
    return None if text == "max" else int(text)


def _statistics(file: Path) -> dict[str, int]:
    lines = file.read_text().splitlines() if file.exists() else []
    return {name: int(value) for name, value in (line.split() for line in lines)}
