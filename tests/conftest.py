"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from weightd_proto import weightd_pb2


@pytest.fixture(autouse=True, scope="session")
def rehearse_in_this_process() -> Iterator[None]:
    """An import's rehearsal needs torch, whose loading takes a child process seconds; here it is loaded already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weightd.rehearsal._rehearse", rehearse_here)
        yield


def rehearse_here(record: weightd_pb2.Model, folder: Path) -> str:
    from flashclient.rehearsal import RefusedFileError, rehearse

    try:
        rehearse(record, folder)
    except RefusedFileError as error:
        return str(error)
    return ""
