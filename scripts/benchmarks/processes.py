"""Processes that a benchmark starts: a private weightd, and children that print JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashclient.daemon.private import is_serving
from flashclient.errors import FlashClientError

START_WITHIN_S = 120.0
POLL_S = 0.02
SCRIPTS = Path(__file__).parents[1]
WEIGHTD = (sys.executable, "-m", "weightd")


class BenchError(Exception):
    """A part of the benchmark failed. The text names the part and has the last line of its standard error."""


@dataclass(frozen=True)
class Daemon:
    """A running weightd."""

    address: str
    pid: int


@contextmanager
def serving(
    store: Path, dram_bytes: int, flags: Sequence[str] = (), program: Sequence[str] = WEIGHTD
) -> Iterator[Daemon]:
    """Runs a private weightd. Raises BenchError with its last line of standard error if it does not start.

    Args:
        program: what is started instead of weightd, with weightd's flags.
    """
    with tempfile.TemporaryDirectory(prefix="bench-paper-") as folder:
        address, log_path = f"unix:{folder}/weightd.sock", Path(folder, "log")
        command = [*program, "--store", str(store), "--listen", address]
        reading_end, writing_end = os.pipe()
        command += ["--dram", str(dram_bytes), "--owner-fd", str(reading_end), *flags]
        with log_path.open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[reading_end])
        os.close(reading_end)
        try:
            _await(process, address, log_path)
            yield Daemon(address, process.pid)
        finally:
            os.close(writing_end)  # ends the daemon, whose owner is this pipe
            process.wait()


def _await(process: subprocess.Popen[bytes], address: str, log_path: Path) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    while process.poll() is None and time.monotonic() < deadline:
        if is_serving(address):
            return
        time.sleep(POLL_S)
    said = log_path.read_text(errors="replace").strip().splitlines() or ["nothing"]
    raise BenchError(f"weightd does not serve: {said[-1]}")


def module_command(name: str, *options: str) -> list[str]:
    """The command that runs a module of scripts/ as a process. `options`: of the interpreter."""
    return ["env", f"PYTHONPATH={SCRIPTS}", sys.executable, *options, "-m", name]


def run_json(command: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> Any:
    """Runs a command that prints JSON. Raises BenchError with its last line of standard error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise BenchError(f"{what}: {said[-1]}")
    return json.loads(done.stdout)


def print_json(run: Callable[[], Any], name: str) -> int:
    """The other side of run_json(): prints what `run` returns, or its error, and returns the exit status."""
    try:
        print(json.dumps(run()))
    except (FlashClientError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


def pss_bytes(pid: str) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
