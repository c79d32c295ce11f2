"""Git LFS pointers: what `git clone` leaves in the place of large files where git-lfs is not installed."""

from __future__ import annotations

from pathlib import Path

from weightd.errors import CheckpointError

BEGIN = b"version https://git-lfs"
POINTER_BYTES_MAX = 1024  # by its specification


def check_no_pointer(path: Path) -> None:
    """CheckpointError if the file holds a pointer, and not what it points to."""
    if path.stat().st_size > POINTER_BYTES_MAX:
        return
    with path.open("rb") as file:
        found = file.read(len(BEGIN)) == BEGIN
    if found:
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`, or download it")
