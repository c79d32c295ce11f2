"""llama-cpp-python's server, as a peer of `flashclient serve`."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from planted.gguf_file import text_of

from benchmarks.processes import POLL_S, SCRIPTS, START_WITHIN_S, BenchError

CONTEXT_TOKENS = 512  # their keys and values lie in the memory that the weights need
HERE = "127.0.0.1"


@contextmanager
def llama_served(python: Path, gguf: Path, threads: int, prefix: Sequence[str] = ()) -> Iterator[str]:
    """The address of a server of `gguf`. Its requests wait for each other, as they do by default but for interrupts.

    Args:
        prefix: put before the command.

    Raises:
        BenchError: it does not start; has its last line of standard error.
    """
    with socket.create_server((HERE, 0)) as free:
        port = free.getsockname()[1]
    flags = {"host": HERE, "port": port, "n_ctx": CONTEXT_TOKENS, "n_threads": threads, "n_threads_batch": threads}
    # Not the defaults: locked memory would not fit, and a new request would end the one that is answered.
    flags |= {"use_mlock": "false", "interrupt_requests": "false", "logits_all": "false", "verbose": "false"}
    command = [
        *prefix,
        "env",
        f"PYTHONPATH={SCRIPTS}",
        str(python),
        "-m",
        "benchmarks.llama_serve",
        "--model",
        str(gguf),
    ]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    log = gguf.with_suffix(".server-log")
    with log.open("wb") as errors, subprocess.Popen(command, stdout=errors, stderr=errors) as process:
        try:
            _await(process, f"http://{HERE}:{port}/v1/models", log)
            yield f"http://{HERE}:{port}/v1"
        finally:
            process.terminate()


def _await(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=POLL_S):
                return
        except OSError:
            time.sleep(POLL_S)
    said = log.read_text(errors="replace").strip().splitlines() or [f"status {process.returncode}"]
    raise BenchError(f"llama-cpp-python's server does not serve: {said[-1]}")


def prompt_of(ids: Sequence[int]) -> str:
    """The text of ids, which its tokenizer makes the same ids: the server takes no ids."""
    return "".join(map(text_of, ids))
