"""Answers what an import asks: derives the recipe of a checkpoint, and rehearses what the import has made with it.
And what `weightd plan` asks: what a token costs.

    python -m flashclient.generation.import_requests DESCRIPTOR

weightd runs it in a child process (weightd.importing.client_process), because transformers takes hundreds of megabytes.
A client that has started the import answers itself (answering()), because it has loaded transformers already.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

from flashclient.errors import ModelError
from flashclient.generation.rehearsal import RefusedFileError, rehearse
from flashclient.generation.token_cost import token_cost
from flashclient.recipes.derive import derive
from flashclient.torch_state import one_thread
from weightd_proto.weightd_pb2 import ImportRequest, ImportResponse


def answer(request: ImportRequest) -> ImportResponse:
    try:
        if request.WhichOneof("what") == "derive":
            with one_thread():  # tiny instances
                return ImportResponse(recipe=derive(request.derive))
        if request.WhichOneof("what") == "cost":
            return token_cost(request.cost.record, Path(os.fsdecode(request.cost.folder)))
        return ImportResponse(notes=rehearse(request.rehearse.record, Path(os.fsdecode(request.rehearse.folder))))
    except (ModelError, RefusedFileError) as error:
        return ImportResponse(refusal=_in_utf8(str(error).replace("\n", "\\n")))
    except Exception as error:  # libraries raise anything for a configuration of unknown origin
        return ImportResponse(refusal=_in_utf8(f"{type(error).__name__}: {' '.join(str(error).split())}"))


def _in_utf8(text: str) -> str:
    """Text that may name a path which the locale cannot decode."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


@contextmanager
def answering() -> Iterator[int]:
    """The descriptor for `weightd import --client-fd`. A thread of this process answers its requests meanwhile."""
    ours, theirs = multiprocessing.Pipe()
    answerer = threading.Thread(target=_answer_all, args=(ours,), name="flashclient-import")
    answerer.start()
    with ours:
        try:
            with theirs:
                yield theirs.fileno()
        finally:
            answerer.join()  # it ends: the import has ended, and both copies of the other end are closed


def _answer_all(connection: Connection) -> None:
    with suppress(EOFError, OSError):
        while True:
            request = ImportRequest.FromString(connection.recv_bytes())
            connection.send_bytes(answer(request).SerializeToString())


def main() -> None:
    warnings.simplefilter("ignore")
    _answer_all(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
