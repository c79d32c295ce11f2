"""Sizes with units, such as 6.5GiB: parsing and formatting."""

from __future__ import annotations

import re
from dataclasses import dataclass

from weightd.errors import UsageError

UNITS_BYTES = {
    "": 1,
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
BYTES_MAX = 1 << 80
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class Amount:
    """A size or a percentage, or neither if the user gave nothing."""

    bytes: int | None = None
    percent: float | None = None


NOTHING_GIVEN = Amount()


def parse_size(text: str) -> int:
    """The bytes of a text like "6.5GiB", "300 MB" or "4096". Raises UsageError."""
    units = {name.lower(): size_bytes for name, size_bytes in UNITS_BYTES.items()}
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in units:
        unit = match[2][:1].lower() if match is not None and match[2] else ""
        meant = f"{match[1]}{unit.upper()}iB" if match is not None and unit and unit in "kmgt" else "6.5GiB, 512MiB"
        raise UsageError(f"not a size: {text!r}, try {meant} or a number of bytes")
    amount = float(match[1])
    if amount > BYTES_MAX:
        raise UsageError(f"not a size: {match[1][:20]}... is more than any machine has")
    return round(amount * units[match[2].lower()])


def format_size(size_bytes: int) -> str:
    """The size in the largest binary unit that is not above it, with one decimal below a hundred: 6.5GiB, 512MiB."""
    if size_bytes > BYTES_MAX:  # from a damaged file
        return "more than 2^80 bytes"
    unit, unit_bytes = "B", 1
    for name in ("KiB", "MiB", "GiB", "TiB"):
        if size_bytes >= UNITS_BYTES[name]:
            unit, unit_bytes = name, UNITS_BYTES[name]
    amount = size_bytes / unit_bytes
    digits = 0 if amount == int(amount) or amount >= 100 else 1
    return f"{amount:.{digits}f}{unit}"


def format_enough(size_bytes: int) -> str:
    """Like format_size, but rounded up, for a size that a user is told to provide."""
    text = format_size(size_bytes)
    return text if parse_size(text) >= size_bytes else f"{-(-size_bytes >> 20)}MiB"


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
