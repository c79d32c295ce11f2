"""What fuzzing has found, and what it starts from, tried by every run of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from file_targets import TARGETS, stop
from grpc_target import grpc_messages, served

FUZZ = Path(__file__).parent / "fuzz"

PYTHON = TARGETS | {"grpc_messages": grpc_messages}
INPUTS = [path for name in PYTHON for path in sorted((FUZZ / "corpus" / name).iterdir())]


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    yield
    stop()
    served().stop()
    served.cache_clear()


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_input_of_the_corpus_is_answered_or_refused(path: Path) -> None:
    PYTHON[path.parent.name](path.read_bytes())


def test_every_target_has_a_corpus() -> None:
    assert {path.name for path in (FUZZ / "corpus").iterdir()} == {*PYTHON, "ring_fuzz", "socket_fuzz"}
