"""The arenas of the C heap, counted in a process whose threads allocate at once."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from weightd.machine.heap import ARENAS

PROGRAM = """
import ctypes, sys, threading
from weightd.machine.heap import bound_heap
if sys.argv[1] == "bounded":
    bound_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
together = threading.Barrier(8)
def allocate():
    together.wait()
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.fdopen.restype = ctypes.c_void_p
stdout = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, stdout)
libc.fflush(stdout)
"""


def arenas(*arguments: str) -> int:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.count("<heap nr=")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="a libc without arenas")
def test_threads_share_two_arenas() -> None:
    assert arenas("bounded") <= ARENAS < arenas("unbounded")
