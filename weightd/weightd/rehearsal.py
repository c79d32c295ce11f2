"""Tries in a child process whether a client can use a model's files, before its weights are written.

The child is the client's own code (flashclient/rehearsal.py). Where torch and transformers are not installed no client
runs, and nothing is tried.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from weightd.errors import CheckpointError
from weightd_proto import weightd_pb2

PACKAGES = ("torch", "transformers")
TIMEOUT_S = 1800.0  # a model of 400 GB is walked through in some minutes
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def check_files(record: weightd_pb2.Model, folder: Path, checkpoint: Path) -> None:
    """CheckpointError if a client could not use the files of `record` in `folder`, which came from `checkpoint`."""
    refusal = _rehearse(record, folder)
    if refusal:
        raise CheckpointError(f"no client could run {checkpoint}: {refusal}")


def _rehearse(record: weightd_pb2.Model, folder: Path) -> str:
    """Why it failed, in one line; empty where it did not."""
    if any(find_spec(package) is None for package in PACKAGES):
        return ""
    command = [sys.executable, "-P", "-m", "flashclient.rehearsal", str(folder)]
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
    except subprocess.TimeoutExpired:
        return f"trying it out took longer than {TIMEOUT_S:g} s"
    if result.returncode == 0:
        return ""
    said = (result.stdout if result.returncode == 1 else b"") or result.stderr
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"trying it out ended with status {result.returncode}"
