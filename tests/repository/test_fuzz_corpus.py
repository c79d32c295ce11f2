"""Every run of the tests tries the inputs that fuzzing has found and those that it starts from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import checkpoint_targets
import file_targets
import gguf_fields
import grpc_target
import pytest
from repository import ROOT

FUZZ = ROOT / "tests" / "fuzz"

PYTHON = checkpoint_targets.TARGETS | file_targets.TARGETS | grpc_target.TARGETS
MUTATORS = checkpoint_targets.MUTATORS | file_targets.MUTATORS | grpc_target.MUTATORS
INPUTS = [path for name in PYTHON for path in sorted((FUZZ / "corpus" / name).iterdir())]


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    yield
    file_targets.stop()
    grpc_target.served().stop()
    grpc_target.served.cache_clear()


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_input_of_the_corpus_is_answered_or_refused(path: Path) -> None:
    PYTHON[path.parent.name](path.read_bytes())


def test_every_target_has_a_corpus() -> None:
    assert {path.name for path in (FUZZ / "corpus").iterdir()} == {*PYTHON, "ring_fuzz", "socket_fuzz"}


def test_mutation_by_field_begins_with_the_file_itself() -> None:
    whole = (FUZZ / "corpus" / "gguf_header" / "whole").read_bytes()
    assert gguf_fields.pack(gguf_fields.parse(whole)) == whole
    for path in (FUZZ / "corpus" / "grpc_messages").iterdir():
        assert grpc_target.joined(grpc_target.split_calls(path.read_bytes())) == path.read_bytes()


@pytest.mark.parametrize("name", sorted(MUTATORS))
def test_inputs_that_were_mutated_by_field_are_answered_or_refused(name: str) -> None:
    """Tries three mutations of each input that can be parsed, the same ones in every run."""
    for path in sorted((FUZZ / "corpus" / name).iterdir()):
        data: bytes | None = path.read_bytes()
        for seed in range(3):
            data = MUTATORS[name].by_field(data, seed) if data is not None else None
            PYTHON[name](data or b"")
