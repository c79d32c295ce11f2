"""What all tests share: child processes of an import run in this process, and torch computes on one thread.

Loading torch takes seconds. Sharing out the work of a tiny model takes several times longer than computing it, and
pytest-xdist keeps every core busy. Tests of several threads ask for them with torch_threads.all_cores.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightd_proto import weightd_pb2

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded, here and in every process that a test starts


@pytest.fixture(autouse=True, scope="session")
def signals_are_not_ignored() -> None:
    """nohup and pytest-xdist ignore SIGHUP and SIGINT, and processes that a test starts would inherit that."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def import_in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weightd.importing.rehearsal._rehearse", rehearse_here)
        patch.setattr("weightd.checkpoint.gguf_files._write_tokenizer", write_tokenizer_here)
        yield


def rehearse_here(record: weightd_pb2.Model, folder: Path) -> str:
    from flashclient.generation.rehearsal import RefusedFileError, rehearse

    try:
        rehearse(record, folder)
    except RefusedFileError as error:
        return str(error)
    return ""


def write_tokenizer_here(path: Path, folder: Path) -> None:
    from weightd.checkpoint.gguf_tokenizer import write_tokenizer

    write_tokenizer(path, folder)
