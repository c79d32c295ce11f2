"""Free memory from made-up proc and cgroup trees, and inside a real memory cgroup."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from memory_cgroup import memory_cgroup

from flashclient.calibration.free_memory import available_bytes

MIB = 1 << 20
AVAILABLE_BYTES = 5000 << 10
UNIFIED = "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
HYBRID = """\
35 31 0:32 / /sys/fs/cgroup/memory rw shared:1 - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"""


def tree(root: Path, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    made = {
        "proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 5000 kB",
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": mounts,
    }
    for name, content in (made | files).items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n" if content else "")
    return root


def test_a_machine_without_cgroups(tmp_path: Path) -> None:
    assert available_bytes(tree(tmp_path, "", "", {})) == AVAILABLE_BYTES


@pytest.mark.parametrize(("above", "free_bytes"), [("max", 2000), ("9500", 1500)])
def test_version_2_counts_every_limit_up_the_hierarchy(tmp_path: Path, above: str, free_bytes: int) -> None:
    files = {
        "sys/fs/cgroup/user/memory.max": above,
        "sys/fs/cgroup/user/memory.current": "8000",
        "sys/fs/cgroup/user/job/memory.max": "3000",
        "sys/fs/cgroup/user/job/memory.current": "1500",
        "sys/fs/cgroup/user/job/memory.stat": "anon 5\ninactive_file 500",
    }
    assert available_bytes(tree(tmp_path, "0::/user/job", UNIFIED, files)) == free_bytes


def test_version_1_beside_a_unified_hierarchy_without_memory(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "7000",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "3000",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1500",
        "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 500",
    }
    assert available_bytes(tree(tmp_path, "4:memory:/job\n3:cpu:/\n0::/", HYBRID, files)) == 2000


def test_a_container_that_sees_its_own_cgroup_as_the_mount(tmp_path: Path) -> None:
    mount = "30 20 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
    files = {"sys/fs/cgroup/memory.max": "3000", "sys/fs/cgroup/memory.current": "1000"}
    assert available_bytes(tree(tmp_path, "0::/docker/abc", mount, files)) == 2000


def test_a_limit_that_is_passed_leaves_nothing(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": "3000", "sys/fs/cgroup/memory.current": "3100"}
    assert available_bytes(tree(tmp_path, "0::/", UNIFIED, files)) == 0


def test_inside_a_real_cgroup() -> None:
    program = "from flashclient.calibration.free_memory import available_bytes; print(available_bytes())"
    with memory_cgroup(900 * MIB) as capped:
        started = [*capped.prefix, sys.executable, "-c", program]
        done = subprocess.run(started, capture_output=True, text=True, check=True)
    assert 100 * MIB < int(done.stdout) < 900 * MIB
