"""Damage to a file on disk, as flash does it: one bit, the size and the rest as they were."""

from __future__ import annotations

from pathlib import Path


def flip_bit(path: Path, offset_bytes: int) -> None:
    """The file's byte at `offset_bytes` with one bit turned over."""
    with path.open("r+b") as file:
        file.seek(offset_bytes)
        byte = file.read(1)[0]
        file.seek(offset_bytes)
        file.write(bytes([byte ^ 0x10]))
