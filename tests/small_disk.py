"""A small ext4 file system of its own, so that a test can fill it to the last block."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BLOCK_BYTES = 1024  # the smallest of ext4


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Where it is mounted, in `folder`; skips the test where nothing can be mounted."""
    image, mount = folder / "disk.img", folder / "disk"
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    image.touch()
    os.truncate(image, size_bytes)
    mount.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, mount], check=False).returncode != 0:
        pytest.skip("needs loop devices")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)  # io_uring lets go of files a little later


def fill(disk: Path, size_bytes: int | None = None) -> Path:
    """Takes that much of its room, by default all; deleting the file that is returned gives it back."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        if size_bytes is not None:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
            return ballast
        piece_bytes = shutil.disk_usage(disk).free
        while piece_bytes >= BLOCK_BYTES:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), piece_bytes)
            except OSError:  # some of it is promised already to others' files
                piece_bytes //= 2
    return ballast
