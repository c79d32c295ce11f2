"""The value of --dram within made-up memory limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flashclient.memory_limits import MemoryLimit
from weightd.errors import SpaceError
from weightd.machine.budget import (
    INTERPRETER_BYTES,
    GrowingDram,
    ModelDemand,
    check_dram,
    default_dram_bytes,
    percent_of_memory,
    unservable,
)
from weightd.serving.config import load_config
from weightd.sizes import parse_size

GIB = 1 << 30


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


def test_a_store_is_not_served_where_other_models_leave_no_room_for_one() -> None:
    demands = [replace(SMALL, name=str(number), catalog_bytes=1 << 20) for number in range(3)]
    check_dram(GIB + (2 << 20), LIMITS, demands)
    with pytest.raises(SpaceError, match=r"too small: 0 needs at least 1026MiB"):
        check_dram(GIB + (2 << 20) - 1, LIMITS, demands)


def test_exactly_the_cgroup_is_enough_and_a_byte_more_is_not() -> None:
    most = 8 * GIB - INTERPRETER_BYTES
    check_dram(most, LIMITS, [SMALL])
    with pytest.raises(SpaceError, match=r"/cgroup.*at most --dram"):
        check_dram(most + 1, LIMITS, [SMALL])


def told_instead(dram_bytes: int, percent: float | None, limit_bytes: int = 8 * GIB) -> str:
    """The --dram that the refusal suggests."""
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
