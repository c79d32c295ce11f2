"""The readahead of the device on which a file lies."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.processes import BenchError


def readahead_file(path: Path) -> Path:
    """The file in /sys with the readahead, in KiB, of the device that holds `path`. OSError if there is none."""
    device = path.stat().st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve(strict=True)
    of_disk = folder / "queue"  # a partition has that of the disk above it
    return (of_disk if of_disk.is_dir() else folder.parent / "queue") / "read_ahead_kb"


@contextmanager
def readahead(path: Path, kib: int) -> Iterator[None]:
    """Sets the readahead of the device that holds `path`, for files opened meanwhile.

    It is restored at the end, also after an error or SIGTERM.

    Raises:
        BenchError: it cannot be set; one must be root for that.
    """
    try:
        file = readahead_file(path)
        before = file.read_text()
        file.write_text(str(kib))
    except OSError as error:
        raise BenchError(f"the readahead of the device under {path} cannot be set: {error}; run it as root") from error
    previous = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        file.write_text(before)
        signal.signal(signal.SIGTERM, previous)


def _exit(number: int, _: Any) -> None:
    sys.exit(128 + number)
