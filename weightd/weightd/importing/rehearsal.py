"""Tries in a child process whether a client can use a model's files, before its weights are written.

The child runs the client's own code (flashclient/generation/rehearsal.py). If torch and transformers are not installed,
or this Python may not be started, no client can run, and nothing is tried.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

from weightd.errors import CheckpointError
from weightd_proto import weightd_pb2

PACKAGES = ("torch", "transformers")
TIMEOUT_S = 1800.0  # a model of 400 GB is walked through in some minutes
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

Rehearse = Callable[[weightd_pb2.Model, Path], str]  # says why it failed, in one line; "" where it did not


def check_runnable(record: weightd_pb2.Model, folder: Path, checkpoint: Path, rehearse: Rehearse | None = None) -> None:
    """CheckpointError if a client could not use the files of `record` in `folder`, which came from `checkpoint`.

    `rehearse`: tries it; by default a child process.
    """
    refusal = (rehearse or _rehearse)(record, folder)
    if refusal:
        raise CheckpointError(f"no client could run {checkpoint}: {refusal}")


def asking(descriptor: int) -> Rehearse:
    """Whoever started us tries it: loading torch takes seconds, and a client has loaded it.

    `descriptor`: of a connection of multiprocessing; flashclient.generation.rehearsal.answering() holds the other end.
    """
    connection = Connection(descriptor)

    def ask(record: weightd_pb2.Model, folder: Path) -> str:
        try:
            connection.send_bytes(os.fsencode(folder))
            connection.send_bytes(record.SerializeToString())
            return connection.recv_bytes().decode()
        except (OSError, EOFError):
            return "whoever was to try it out has gone"

    return ask


def _rehearse(record: weightd_pb2.Model, folder: Path) -> str:
    """Why it failed, in one line; empty where it did not."""
    if any(find_spec(package) is None for package in PACKAGES):
        return ""
    command = [sys.executable, "-P", "-m", "flashclient.generation.rehearsal", str(folder)]
    environment = {**os.environ, **ENVIRONMENT}
    try:
        result = subprocess.run(
            command,
            input=record.SerializeToString(),
            capture_output=True,
            check=False,
            env=environment,
            timeout=TIMEOUT_S,
        )
    except PermissionError:  # a user who may not run this Python, but runs in it: who changed its user, for one
        return ""
    except subprocess.TimeoutExpired:
        return f"trying it out took longer than {TIMEOUT_S:g} s"
    if result.returncode == 0:
        return ""
    said = (result.stdout if result.returncode == 1 else b"") or result.stderr
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"trying it out ended with status {result.returncode}"
