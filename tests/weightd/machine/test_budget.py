"""Memory limits from made-up proc and cgroup trees, and the sums made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightd.errors import SpaceError
from weightd.machine.budget import (
    INTERPRETER_BYTES,
    GrowingDram,
    MemoryLimit,
    ModelDemand,
    check_dram,
    default_dram_bytes,
    memory_limits,
    percent_of_memory,
    tightest,
    unservable,
)
from weightd.serving.config import load_config
from weightd.sizes import parse_size

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n" if content else "")
    return root


def machine(cgroup: str, mountinfo: str) -> dict[str, str]:
    return {
        "proc/meminfo": f"MemTotal: {16 * GIB >> 10} kB\nMemFree: 1 kB\nMemAvailable: {12 * GIB >> 10} kB",
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": mountinfo,
    }


def test_a_machine_without_cgroups(tmp_path: Path) -> None:
    limits = memory_limits(write(tmp_path, machine("", "")))
    assert limits == [MemoryLimit("the machine", 16 * GIB, 12 * GIB)]


def test_v2_counts_every_limit_up_the_hierarchy(tmp_path: Path) -> None:
    files = machine("0::/user/job", "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
    files |= {
        "sys/fs/cgroup/user/memory.max": str(4 * GIB),
        "sys/fs/cgroup/user/memory.current": str(3 * GIB),
        "sys/fs/cgroup/user/memory.stat": f"anon 5\ninactive_file {GIB}",
        "sys/fs/cgroup/user/job/memory.max": "max",
        "sys/fs/cgroup/user/job/memory.high": str(5 * GIB),
        "sys/fs/cgroup/user/job/memory.current": str(GIB),
    }
    limits = memory_limits(write(tmp_path, files))
    job, user = limits[1:]
    assert (job.limit_bytes, job.free_bytes) == (5 * GIB, 4 * GIB)
    assert (user.limit_bytes, user.free_bytes) == (4 * GIB, 2 * GIB)
    assert tightest(limits) is user


def test_v1_beside_a_unified_hierarchy_without_memory(tmp_path: Path) -> None:
    mounts = (
        "35 31 0:32 / /sys/fs/cgroup/memory rw shared:1 - cgroup cgroup rw,memory\n"
        "36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    )
    files = machine("4:memory:/job\n3:cpu:/\n0::/", mounts)
    files |= {
        "sys/fs/cgroup/unified/cgroup.procs": "",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(2 * GIB),
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(GIB),
        "sys/fs/cgroup/memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}",
    }
    limits = memory_limits(write(tmp_path, files))
    assert [(limit.limit_bytes, limit.free_bytes) for limit in limits[1:]] == [(2 * GIB, 3 * GIB // 2)]


def test_a_container_that_sees_its_own_cgroup_as_the_mount(tmp_path: Path) -> None:
    files = machine("0::/docker/abc", "30 20 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
    files |= {"sys/fs/cgroup/memory.max": str(GIB), "sys/fs/cgroup/memory.current": "0"}
    assert [limit.limit_bytes for limit in memory_limits(write(tmp_path, files))[1:]] == [GIB]


def test_this_machine_has_memory() -> None:
    assert all(0 <= limit.free_bytes <= limit.limit_bytes for limit in memory_limits())


LIMITS = [MemoryLimit("the machine", 16 * GIB, 12 * GIB), MemoryLimit("/cgroup", 8 * GIB, 6 * GIB)]
SMALL = ModelDemand("small", GIB, 2 * GIB)
LARGE = ModelDemand("large", 4 * GIB, 40 * GIB)
TINY, OTHER = ModelDemand("tiny", 1 << 20, 3 << 20), ModelDemand("other", 1 << 20, 2 << 20)


def test_the_default_is_half_of_what_is_free() -> None:
    assert default_dram_bytes(LIMITS, [LARGE]) == (6 * GIB - INTERPRETER_BYTES) // 2
    assert default_dram_bytes(LIMITS, []) == (6 * GIB - INTERPRETER_BYTES) // 2
    assert default_dram_bytes(LIMITS, [SMALL]) == 2 * GIB


def test_the_default_grows_with_the_models_that_come(tmp_path: Path) -> None:
    def dram(*given: str, served: tuple[ModelDemand, ...] = (TINY,)) -> GrowingDram:
        config = load_config(["--store", str(tmp_path), *given])
        return GrowingDram(config.dram, config.dram_floor, 3 << 20, served)

    growing = dram()
    assert growing.with_model(TINY) == (3 << 20, 3 << 19)
    assert growing.with_model(OTHER) == growing.with_model(OTHER) == (5 << 20, 5 << 19)
    for fixed in (dram("--dram", "3MiB"), dram("--dram", "1%"), dram(served=())):  # the last took what was free
        assert fixed.with_model(OTHER) == (3 << 20, 3 << 19)


def test_percent_is_of_the_tightest_limit() -> None:
    assert percent_of_memory(25.0, LIMITS) == 2 * GIB


def test_too_small_names_the_minimum_of_each_model() -> None:
    with pytest.raises(SpaceError, match=r"small needs at least 1(\.0)?GiB.*large needs at least 4(\.0)?GiB"):
        check_dram(GIB - 1, LIMITS, [SMALL, LARGE])


def test_a_store_is_served_when_one_model_fits() -> None:
    check_dram(GIB, LIMITS, [SMALL, LARGE])
    assert unservable(GIB, [SMALL, LARGE]) == [LARGE]


def test_exactly_the_cgroup_is_enough_and_a_byte_more_is_not() -> None:
    most = 8 * GIB - INTERPRETER_BYTES
    check_dram(most, LIMITS, [SMALL])
    with pytest.raises(SpaceError, match=r"/cgroup.*at most --dram"):
        check_dram(most + 1, LIMITS, [SMALL])


def told_instead(dram_bytes: int, percent: float | None, limit_bytes: int = 8 * GIB) -> str:
    """What the refusal says to give."""
    with pytest.raises(SpaceError) as caught:
        check_dram(dram_bytes, [MemoryLimit("/cgroup", limit_bytes, limit_bytes)], [], percent)
    return str(caught.value).rpartition("; ")[2]


def test_all_of_the_memory_is_refused_with_a_percentage_that_is_taken() -> None:
    assert told_instead(8 * GIB, 100.0) == "give at most --dram 98%"
    check_dram(percent_of_memory(98.0, LIMITS), LIMITS, [], 98.0)
    with pytest.raises(
        SpaceError, match=r"--dram 100% \(of 8GiB\) and 150MiB for the interpreter are more than the 8GiB"
    ):
        check_dram(8 * GIB, LIMITS, [], 100.0)


def test_what_a_refusal_says_to_give_is_taken() -> None:
    told = told_instead(8 * GIB, None).removeprefix("give at most --dram ")
    check_dram(parse_size(told), LIMITS, [])
    assert told_instead(GIB, 100.0, 100 << 20) == told_instead(GIB, None, 100 << 20) == "raise that limit"
