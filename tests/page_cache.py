"""Which pages of a file are in the page cache."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)


def cached_pages(path: Path) -> int:
    """mincore() over the whole file."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), size_bytes, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
    flags = (ctypes.c_ubyte * -(-size_bytes // mmap.PAGESIZE))()
    address = np.frombuffer(mapping, np.uint8).ctypes.data
    if _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), flags) != 0:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return sum(flag & 1 for flag in flags)
