"""Memory limits from made-up proc and cgroup trees, and inside a real memory cgroup."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from memory_cgroup import memory_cgroup

from flashclient.memory_limits import MemoryLimit, free_bytes, memory_limits, tightest

MIB, GIB = 1 << 20, 1 << 30
MACHINE = MemoryLimit("the machine", 16 * GIB, 12 * GIB)
UNIFIED = "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
HYBRID = """\
35 31 0:32 / /sys/fs/cgroup/memory rw shared:1 - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"""


def tree(root: Path, cgroup: str, mounts: str, files: dict[str, str | int]) -> Path:
    made: dict[str, str | int] = {
        "proc/meminfo": f"MemTotal: {16 * GIB >> 10} kB\nMemFree: 1 kB\nMemAvailable: {12 * GIB >> 10} kB",
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": mounts,
    }
    for name, content in (made | files).items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n" if content != "" else "")
    return root


def test_a_machine_without_cgroups(tmp_path: Path) -> None:
    limits = memory_limits(tree(tmp_path, "", "", {}))
    assert limits == [MACHINE]
    assert free_bytes(limits) == MACHINE.free_bytes


@pytest.mark.parametrize(("above", "free"), [("max", 2000), ("9500", 1500)])
def test_version_2_counts_every_limit_up_the_hierarchy(tmp_path: Path, above: str, free: int) -> None:
    files: dict[str, str | int] = {
        "sys/fs/cgroup/user/memory.max": above,
        "sys/fs/cgroup/user/memory.current": 8000,
        "sys/fs/cgroup/user/job/memory.max": 3000,
        "sys/fs/cgroup/user/job/memory.current": 1500,
        "sys/fs/cgroup/user/job/memory.stat": "anon 5\ninactive_file 500",
    }
    limits = memory_limits(tree(tmp_path, "0::/user/job", UNIFIED, files))
    assert free_bytes(limits) == free
    assert len(limits) == (2 if above == "max" else 3)


def test_the_tightest_limit_is_not_always_our_own_cgroups(tmp_path: Path) -> None:
    files: dict[str, str | int] = {
        "sys/fs/cgroup/user/memory.max": 4 * GIB,
        "sys/fs/cgroup/user/memory.current": 3 * GIB,
        "sys/fs/cgroup/user/memory.stat": f"anon 5\ninactive_file {GIB}",
        "sys/fs/cgroup/user/job/memory.max": "max",
        "sys/fs/cgroup/user/job/memory.high": 5 * GIB,
        "sys/fs/cgroup/user/job/memory.current": GIB,
    }
    limits = memory_limits(tree(tmp_path, "0::/user/job", UNIFIED, files))
    job, user = limits[1:]
    assert (job.limit_bytes, job.free_bytes) == (5 * GIB, 4 * GIB)
    assert (user.limit_bytes, user.free_bytes) == (4 * GIB, 2 * GIB)
    assert tightest(limits) is user


@pytest.mark.parametrize(("high", "limit"), [("max", 3000), ("2500", 2500), ("4000", 3000)])
def test_memory_high_bounds_as_memory_max_does(tmp_path: Path, high: str, limit: int) -> None:
    files: dict[str, str | int] = {
        "sys/fs/cgroup/memory.max": 3000,
        "sys/fs/cgroup/memory.high": high,
        "sys/fs/cgroup/memory.current": 1000,
    }
    limits = memory_limits(tree(tmp_path, "0::/", UNIFIED, files))
    assert (limits[1].limit_bytes, free_bytes(limits)) == (limit, limit - 1000)


def test_version_1_beside_a_unified_hierarchy_without_memory(tmp_path: Path) -> None:
    files: dict[str, str | int] = {
        "sys/fs/cgroup/unified/cgroup.procs": "",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,  # none
        "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": 2 * GIB,
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": GIB,
        "sys/fs/cgroup/memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}",
    }
    limits = memory_limits(tree(tmp_path, "4:memory:/job\n3:cpu:/\n0::/", HYBRID, files))
    assert [(limit.limit_bytes, limit.free_bytes) for limit in limits[1:]] == [(2 * GIB, 3 * GIB // 2)]
    assert free_bytes(limits) == 3 * GIB // 2


def test_a_container_that_sees_its_own_cgroup_as_the_mount(tmp_path: Path) -> None:
    mount = "30 20 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
    files: dict[str, str | int] = {"sys/fs/cgroup/memory.max": 3000, "sys/fs/cgroup/memory.current": 1000}
    limits = memory_limits(tree(tmp_path, "0::/docker/abc", mount, files))
    assert [(limit.limit_bytes, limit.free_bytes) for limit in limits[1:]] == [(3000, 2000)]


def test_a_limit_that_is_exceeded_leaves_nothing(tmp_path: Path) -> None:
    files: dict[str, str | int] = {"sys/fs/cgroup/memory.max": 3000, "sys/fs/cgroup/memory.current": 3100}
    assert free_bytes(memory_limits(tree(tmp_path, "0::/", UNIFIED, files))) == 0


def test_this_machine_has_memory() -> None:
    assert all(0 <= limit.free_bytes <= limit.limit_bytes for limit in memory_limits())


def test_inside_a_real_cgroup() -> None:
    program = "from flashclient.memory_limits import *; print(free_bytes(memory_limits()))"
    with memory_cgroup(900 * MIB) as capped:
        started = [*capped.prefix, sys.executable, "-c", program]
        done = subprocess.run(started, capture_output=True, text=True, check=True)
    assert 100 * MIB < int(done.stdout) < 900 * MIB
