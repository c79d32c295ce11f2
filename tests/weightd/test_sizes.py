"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightd.errors import UsageError
from weightd.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("6.5GiB", 6979321856), ("4096", 4096), ("512MiB", 1 << 29), ("1 gb", 10**9), ("2kib", 2048), ("0.5KiB", 512)],
)
def test_sizes_are_parsed(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "50%", "6,5GiB", "1 XiB", "1e9", "nan", "9" * 400, "9" * 30 + "GiB"])
def test_what_is_no_size_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@given(st.integers(0, 1 << 50))
def test_formatted_sizes_are_within_five_percent(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.05)


def test_whole_units_have_no_decimals() -> None:
    assert [format_size(1 << 30), format_size(6979321856), format_size(100)] == ["1GiB", "6.5GiB", "100B"]


def test_a_size_that_only_a_damaged_file_can_have_is_formatted_too() -> None:
    assert format_size(10**400) == "more than 2^80 bytes"
