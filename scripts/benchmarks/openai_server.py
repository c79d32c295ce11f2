"""A `flashclient serve` that a benchmark asks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from benchmarks.processes import BenchError, Daemon

STOP_S = 60.0


@contextmanager
def served(name: str, daemon: Daemon, *flags: str, prefix: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """The address of a server of the model `name`, and its process. Raises BenchError if it does not end in order.

    Args:
        prefix: put before the command.
    """
    command = [*prefix, sys.executable, "-m", "flashclient", "serve", name, "--address", daemon.address, "--port", "0"]
    with subprocess.Popen([*command, "--timeout-s", "600", *flags], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise BenchError(f"the server ended with status {process.wait()}")
        try:
            yield line.rpartition(" ")[2].strip(), process.pid
        finally:
            process.terminate()
        if process.wait(STOP_S) != 0:
            raise BenchError(f"the server ended with status {process.returncode}")
