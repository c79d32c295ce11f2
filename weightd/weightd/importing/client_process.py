"""Asks a process with a client's code what transformers knows.

That is the recipe of a checkpoint, and whether a client can run what the import makes of it. The process is the one
that started the import, if that is a client, and otherwise a child. So the import itself loads neither torch nor
transformers. The answers come from flashclient/generation/import_requests.py.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from weightd.checkpoint.checkpoint import Checkpoint
from weightd.errors import CheckpointError
from weightd_proto.weightd_pb2 import (
    DeriveRequest,
    ImportRequest,
    ImportResponse,
    Model,
    Recipe,
    RehearseRequest,
)

PACKAGES = ("torch", "transformers")
TIMEOUT_S = 1800.0  # a model of 400 GB takes a few minutes
# UTF-8, because libraries take no paths that the locale cannot decode.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONUTF8": "1"}

Ask = Callable[[ImportRequest], ImportResponse]


def derive(checkpoint: Checkpoint, ask: Ask, activation: str = "") -> Recipe:
    """The recipe of a checkpoint. `activation`: see DeriveRequest.

    CheckpointError if there is none, or if the checkpoint's tensors are not those of its configuration.
    """
    request = DeriveRequest(config_json=_as_bytes(checkpoint.config), activation=activation, gguf=checkpoint.gguf)
    for name, tensor in checkpoint.tensors.items():
        request.tensors.add(name=name, dtype=tensor.dtype, shape=tensor.shape)
    response = ask(ImportRequest(derive=request))
    if response.refusal:
        raise CheckpointError(f"{checkpoint.path}: {response.refusal}")
    return response.recipe


def derive_from_config(config: Mapping[str, Any], name: str | Path, ask: Ask) -> Recipe:
    """The recipe of the model `name`, of which there is only a configuration. It names transformers' own tensors.

    CheckpointError if there is none.
    """
    response = ask(ImportRequest(derive=DeriveRequest(config_json=_as_bytes(config), config_only=True)))
    if response.refusal:
        raise CheckpointError(f"{name}: {response.refusal}")
    return response.recipe


@dataclass(frozen=True)
class TokenCost:
    """What a token costs a client on this machine, apart from reading weights. See ImportResponse in weightd.proto."""

    ffn_s: float
    besides_s: float
    picks: int = 0
    kv_bytes: int = 0
    kv_int8_bytes: int = 0


def token_cost(record: Model, folder: Path, ask: Ask) -> TokenCost:
    """What a token of `record` costs, whose config.json is in `folder`. CheckpointError if no client could run it."""
    response = ask(ImportRequest(cost=RehearseRequest(record=record, folder=os.fsencode(folder))))
    if response.refusal:
        raise CheckpointError(f"no client could run {record.name}: {response.refusal}")
    return TokenCost(response.ffn_s, response.besides_s, response.picks, response.kv_bytes, response.kv_int8_bytes)


def _as_bytes(config: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(config)).encode()


def check_runnable(record: Model, folder: Path, checkpoint: Path, ask: Ask) -> list[str]:
    """What a user should know of the model. CheckpointError if a client could not use its files.

    Args:
        folder: has the files of `record`, which came from `checkpoint`.
    """
    response = ask(ImportRequest(rehearse=RehearseRequest(record=record, folder=os.fsencode(folder))))
    if response.refusal:
        raise CheckpointError(f"no client could run {checkpoint}: {response.refusal}")
    return list(response.notes)


def starter(descriptor: int) -> Ask:
    """Asks the client that started this import. It has loaded torch already, which takes seconds.

    `descriptor`: of a multiprocessing connection, whose other end import_requests.answering() has.
    """
    connection = Connection(descriptor)

    def ask(request: ImportRequest) -> ImportResponse:
        try:
            return _exchange(connection, request)
        except (OSError, EOFError):
            return ImportResponse(refusal="the client that started the import has ended")

    return ask


@contextmanager
def child() -> Iterator[Ask]:
    """Asks a child process, which ends with the block."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise CheckpointError(f"an import needs {' and '.join(missing)}: pip install 'weightd[import]'")
    ours, theirs = multiprocessing.Pipe()
    with ours, tempfile.TemporaryFile() as said:
        process = _start(theirs, said)

        def ask(request: ImportRequest) -> ImportResponse:
            try:
                return _exchange(ours, request)
            except (OSError, EOFError):
                return ImportResponse(refusal=_last_line(said) or f"its process ended with status {process.wait()}")

        try:
            yield ask
        finally:
            process.kill()
            process.wait()


def _start(connection: Connection, said: IO[bytes]) -> subprocess.Popen[bytes]:
    with connection:
        descriptor = connection.fileno()
        # -P: Python imports nothing from the current folder.
        command = [sys.executable, "-P", "-m", "flashclient.generation.import_requests", str(descriptor)]
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=[descriptor],
                env={**os.environ, **ENVIRONMENT},
            )
        except PermissionError as error:  # the process changed its user
            raise CheckpointError(f"an import starts {sys.executable}, which this user may not run") from error


def _exchange(connection: Connection, request: ImportRequest) -> ImportResponse:
    connection.send_bytes(request.SerializeToString())
    if not connection.poll(TIMEOUT_S):
        return ImportResponse(refusal=f"there was no answer within {TIMEOUT_S:g} s")
    return ImportResponse.FromString(connection.recv_bytes())


def _last_line(said: IO[bytes]) -> str:
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
