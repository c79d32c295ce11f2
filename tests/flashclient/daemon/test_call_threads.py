"""Calls of gRPC in threads of their own, when the interpreter ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

WAYS = {
    "responses that nobody has read": "kept = _Responses(iter([1]), threads)",
    "responses after a call": "threads.call(int); kept = _Responses(iter([1]), threads)",
    "a call by a destructor": "Late = type('Late', (), {'__del__': lambda self: threads.call(len, '')}); late = Late()",
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_an_interpreter_that_ends_waits_for_no_thread(way: str) -> None:
    code = f"from flashclient.daemon.call_threads import CallThreads, _Responses; threads = CallThreads(); {way}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
