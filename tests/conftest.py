"""What all tests share: child processes of an import run in this process, as loading torch takes seconds.

flashclient is imported before torch: it makes torch's idle threads sleep. If they spin, the processes of pytest-xdist
take the cores from each other, and tests that compute take six times as much CPU.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import flashclient  # noqa: F401 (see above)
from weightd_proto import weightd_pb2


@pytest.fixture(autouse=True, scope="session")
def signals_are_not_ignored() -> None:
    """Restores SIGHUP and SIGINT. nohup and pytest-xdist ignore them, and processes that a test starts would too."""
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
