"""The speed of memory: memory_read.cpp, compiled on first use."""

from __future__ import annotations

import ctypes
import os
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray


def read_memory(array: NDArray[Any], threads: int) -> int:
    """Reads a contiguous array with several threads. Returns the exclusive or of its 64-bit words.

    Raises:
        OSError, subprocess.CalledProcessError: there is no C++ compiler, or it fails.
    """
    return int(_library().read_memory(ctypes.c_void_p(array.ctypes.data), array.nbytes, threads))


@cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_suffix(".cpp")
    compiler = os.environ.get("CXX", "c++")
    with TemporaryDirectory() as folder:
        built = Path(folder) / "memory_read.so"
        flags = ["-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, str(source), "-o", str(built)], check=True)
        library = ctypes.CDLL(str(built))
    library.read_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    library.read_memory.restype = ctypes.c_uint64
    return library
