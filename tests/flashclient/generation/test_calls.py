"""Every parameter of transformers' generate() either gives the dense model's result or is refused by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from call_cases import CASES, NEW, PROMPT, REFUSED_VALUES, Case, World
from call_table import parameters, table
from checkpoints import make_config, make_model, make_tokenizer
from cut_model import clients_of, cut
from repository import ROOT
from torch import Tensor
from transformers import PreTrainedModel

from flashclient import FlashClient
from flashclient.errors import OptionError
from flashclient.generation.arguments import IGNORED, REFUSED

REFUSALS = {**REFUSED, **IGNORED}


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    model = make_model(make_config("llama"), seed=5)  # a text without repetitions
    model.generation_config.eos_token_id = None  # random weights may end a text at once
    return model


@pytest.fixture(scope="module")
def client(dense: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlashClient]:
    with clients_of([cut(dense, make_tokenizer())], tmp_path_factory.mktemp("calls")) as made:
        yield made["tiny"]


@pytest.fixture(scope="module")
def world(dense: Any) -> World:
    one, other = (make_model(make_config("llama", 1, 32, 64, vocab_size=size), seed=3) for size in (320, 384))
    plain = dense.generate(PROMPT, **NEW)[0, PROMPT.shape[1] :].tolist()
    return World(dense.config, make_tokenizer(), dense.get_input_embeddings(), one, other, plain[1])


def same(one: Any, other: Any) -> None:
    """Equal tensors up to rounding, in the same structure."""
    if isinstance(one, Tensor):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            same(*pair)
    else:
        assert (one is None) == (other is None)


def outcome(model: Any, case: Case, world: World) -> tuple[Any, dict[str, Any]]:
    arguments = case.arguments(world)
    torch.manual_seed(5)
    return model.generate(**arguments), arguments


def sequences(output: Any) -> list[list[int]]:
    found: list[list[int]] = (output if isinstance(output, Tensor) else output.sequences).tolist()
    return found


@pytest.mark.parametrize("name", CASES)
def test_works(client: FlashClient, dense: Any, world: World, name: str) -> None:
    case = CASES[name]
    expected, _ = outcome(dense, case, world)
    plain = dense.generate(PROMPT, **NEW)
    assert (sequences(expected) == sequences(plain)) == case.same, "the call tests nothing"
    made, arguments = outcome(client.model, case, world)
    assert sequences(made) == sequences(expected)
    if not isinstance(expected, Tensor):
        assert list(made) == list(expected)
        for field in ("scores", "logits", "hidden_states", "attentions"):
            same(expected.get(field), made.get(field))
    if "streamer" in arguments:
        assert arguments["streamer"].seen[0] == PROMPT.tolist()
        assert len(arguments["streamer"].seen) == NEW["max_new_tokens"] + 2


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(client: FlashClient, name: str) -> None:
    _, neutral = REFUSALS[name]
    before = client.clock.forward_s
    value = REFUSED_VALUES.get(name, 3)
    for generate in (client.generate, client.model.generate):
        with pytest.raises(OptionError, match=f"^{name}=.* is refused: "):
            generate(PROMPT, **NEW, **{name: value})  # type: ignore[operator]
    assert client.clock.forward_s == before
    for value in neutral:
        assert client.generate(PROMPT, max_new_tokens=1, **{name: value}).shape == (1, PROMPT.shape[1] + 1)


def test_the_table_names_every_parameter_of_this_transformers() -> None:
    """A new version of transformers may have more parameters: each needs a case or a refusal."""
    known = set(CASES) | set(REFUSALS) | {"cache_config"}
    assert parameters() == known


def test_the_table_is_that_of_the_script() -> None:
    written = (ROOT / "client/README.md").read_text()
    assert table() in written, f"run {sys.executable} scripts/call_table.py"
