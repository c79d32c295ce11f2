"""Checks that a client can use a model's files, before the weights are written.

A child process runs the client's own code (flashclient/generation/rehearsal.py). If torch and transformers are not
installed, or if this Python may not be started, then no client runs here either, and the check is left out.
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
TIMEOUT_S = 1800.0  # a model of 400 GB takes a few minutes
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

Rehearse = Callable[[weightd_pb2.Model, Path], str]  # returns why it failed, in one line; "" if it passed


def check_runnable(record: weightd_pb2.Model, folder: Path, checkpoint: Path, rehearse: Rehearse | None = None) -> None:
    """CheckpointError if a client could not use the files of `record` in `folder`, which came from `checkpoint`.

    `rehearse`: makes the check. By default it is made in a child process.
    """
    refusal = (rehearse or _rehearse)(record, folder)
    if refusal:
        raise CheckpointError(f"no client could run {checkpoint}: {refusal}")


def asking(descriptor: int) -> Rehearse:
    """Lets the client that started this import make the check. It has loaded torch already, which takes seconds.

    `descriptor`: of a multiprocessing connection, whose other end flashclient.generation.rehearsal.answering() has.
    """
    connection = Connection(descriptor)

    def ask(record: weightd_pb2.Model, folder: Path) -> str:
        try:
            connection.send_bytes(os.fsencode(folder))
            connection.send_bytes(record.SerializeToString())
            return connection.recv_bytes().decode()
        except (OSError, EOFError):
            return "the client that should make the check has ended"

    return ask


def _rehearse(record: weightd_pb2.Model, folder: Path) -> str:
    """Why the rehearsal failed, in one line; empty if it passed."""
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
    except PermissionError:  # the process changed its user, and this user may not start this Python
        return ""
    except subprocess.TimeoutExpired:
        return f"the rehearsal took longer than {TIMEOUT_S:g} s"
    if result.returncode == 0:
        return ""
    said = (result.stdout if result.returncode == 1 else b"") or result.stderr
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"the rehearsal ended with status {result.returncode}"
