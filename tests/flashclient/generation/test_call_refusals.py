"""Calls of generate() that could not do what they ask for: one clear error before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_config, make_model, make_tokenizer
from cut_model import clients_of, cut
from transformers import EosTokenCriteria, GenerationConfig, LogitsProcessor

from flashclient import FlashClient
from flashclient.client import NEW_TOKENS_DEFAULT
from flashclient.errors import OptionError

PROMPT = torch.tensor([[5, 17, 200, 31, 8, 31, 8]])


def config(**fields: Any) -> GenerationConfig:
    return GenerationConfig(**fields)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FlashClient]]:
    model = make_model(make_config("llama", 1, max_position_embeddings=1024), seed=5)
    model.generation_config.eos_token_id = None
    cuts = [cut(model, make_tokenizer(), "words"), cut(model, None, "wordless")]
    with clients_of(cuts, tmp_path_factory.mktemp("refusals")) as made:
        yield made


@pytest.fixture
def client(clients: dict[str, FlashClient]) -> FlashClient:
    return clients["words"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"max_new_token": 3}, "generate\\(\\) has no argument 'max_new_token'; did you mean 'max_new_tokens'"),
        ({"temprature": 0.5}, "did you mean 'temperature'"),
        ({"xyzzy": 1}, "^transformers' generate\\(\\) has no argument 'xyzzy'$"),
        ({"generation_config": config(max_new_token=3)}, "GenerationConfig has no field 'max_new_token'; did you mean"),
        ({"generation_config": {"max_new_tokens": 3}}, "generation_config is a dict: pass a GenerationConfig"),
        ({"generation_config": config(num_beam_groups=2, num_beams=4)}, "^num_beam_groups=2 is refused"),
        ({"generation_config": config(dola_layers="high")}, "^dola_layers='high' is refused"),
        ({"custom_generate": "transformers-community/dola"}, "^custom_generate='transformers-comm.* is refused"),
        ({"custom_generate": "."}, "^custom_generate='.' is refused: it runs code"),
        ({"cache_implementation": "offloaded"}, "^cache_implementation='offloaded' is refused: .*no GPU"),
        ({"cache_implementation": "offloaded_static"}, "no GPU"),
        ({"cache_implementation": "paged"}, "^cache_implementation='paged' is refused"),
        ({"cache_implementation": "quantized"}, "quanto"),
        ({"cache_implementation": "vast"}, "Invalid `cache_implementation`"),
        ({"negative_prompt_ids": PROMPT}, "^negative_prompt_ids= has no effect without guidance_scale="),
        ({"negative_prompt_ids": PROMPT, "guidance_scale": 1}, "has no effect without guidance_scale="),
        ({"assistant_tokenizer": object()}, "^assistant_tokenizer= has no effect without assistant_model="),
        ({"num_assistant_tokens": 3}, "has no effect without assistant_model="),
        ({"max_matching_ngram_size": 3}, "has no effect without prompt_lookup_num_tokens="),
        ({"max_new_tokens": "5"}, "."),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0"),
        ({"max_new_tokens": 2.5}, "^max_new_tokens=2.5 must be a whole number"),
        ({"num_beams": 0}, "^num_beams=0 must be a whole number from 1 on"),
        ({"do_sample": True, "num_return_sequences": -1}, "^num_return_sequences=-1 must be a whole number from 1 on"),
        ({"max_length": 5}, "Input length of input_ids is 7, but `max_length` is set to 5"),
        ({"num_return_sequences": 2}, "Greedy methods"),
        ({"num_beams": 2, "num_return_sequences": 3}, "has to be smaller or equal to `num_beams`"),
        ({"inputs": None, "inputs_embeds": torch.zeros(1, 3, 64), "assistant_model": "."}, "a draft reads tokens"),
        ({"assistant_model": "/nowhere"}, "assistant_model=/nowhere has no config.json"),
        ({"past_key_values": ((1, 2),)}, "past_key_values"),
        ({"past_key_values": "static"}, "past_key_values"),
        ({"temperature": -1.0, "do_sample": True}, "temperature"),
        ({"logits_processor": [3]}, "^logits_processor= contains a int: pass functions of ids and scores"),
        ({"stopping_criteria": EosTokenCriteria(3)}, "^stopping_criteria= is a EosTokenCriteria: pass a list"),
        ({"streamer": 3}, "^streamer= is a int: pass an object with put.. and end.."),
        ({"prefix_allowed_tokens_fn": [3]}, "^prefix_allowed_tokens_fn= is a list: pass a function"),
    ],
)  # fmt: skip
def test_is_refused_before_any_work(client: FlashClient, call: dict[str, Any], message: str) -> None:
    before = client.clock.forward_s
    model: Any = client.model
    for generate in (client.generate, model.generate):
        with pytest.raises(OptionError, match=message):
            generate(**{"inputs": PROMPT} | call)
    assert client.clock.forward_s == before


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_batching_of_requests_is_refused(client: FlashClient, name: str) -> None:
    with pytest.raises(OptionError, match=rf"^{name}\(\) is refused"):
        getattr(client.model, name)([[5, 6]])


def test_without_a_tokenizer(clients: dict[str, FlashClient]) -> None:
    calls: list[dict[str, Any]] = [{"stop_strings": ["a"]}, {"token_healing": True}]
    for call in [*calls, {"generation_config": config(stop_strings=["a"])}]:
        with pytest.raises(
            OptionError, match=r"needs a tokenizer, and this model was stored without one: pass tokenizer="
        ):
            clients["wordless"].generate(PROMPT, **call)
    kept: dict[str, Any] = {"stop_strings": ["zz"], "tokenizer": make_tokenizer(), "max_new_tokens": 3}
    assert clients["wordless"].generate(PROMPT, **kept).shape == (1, 10)


@pytest.mark.parametrize("spelling", ["nothing", "None", "generation_config", "own config"])
def test_the_default_length_whichever_way_none_is_set(client: FlashClient, spelling: str) -> None:
    calls: dict[str, dict[str, Any]] = {
        "nothing": {},
        "None": {"max_new_tokens": None, "max_length": None},
        "generation_config": {"generation_config": config(repetition_penalty=1.1)},
        "own config": {"generation_config": config(eos_token_id=None)},
    }
    model: Any = client.model
    assert model.generate(PROMPT, **calls[spelling]).shape[1] == PROMPT.shape[1] + NEW_TOKENS_DEFAULT
    assert client.stats().new_tokens == NEW_TOKENS_DEFAULT


def test_a_given_config_is_left_as_it_was(client: FlashClient) -> None:
    given = config(repetition_penalty=1.5, max_length=9)
    before = given.to_dict()
    assert client.generate(PROMPT, generation_config=given).shape == (1, 9)
    given.max_length = None
    client.generate(PROMPT, generation_config=given)
    assert given.to_dict() == before | {"max_length": None}


def test_the_models_own_config_is_honoured(client: FlashClient) -> None:
    own = client.model.generation_config
    free = client.generate(PROMPT, max_new_tokens=9)[0].tolist()
    own.eos_token_id, own.max_new_tokens = [free[8], 3], 9
    try:
        expected = free[: free.index(free[8], 7) + 1]
        assert client.generate(PROMPT)[0].tolist() == expected
        assert client.stats().new_tokens == len(expected) - 7
        own.num_beam_groups = 3
        with pytest.raises(OptionError, match=r"^num_beam_groups=3 is refused"):
            client.generate(PROMPT)
        assert client.generate(PROMPT, num_beam_groups=None)[0].tolist() == expected
    finally:
        own.eos_token_id = own.max_new_tokens = own.num_beam_groups = None


def test_criteria_of_ones_own_replace_the_end(client: FlashClient) -> None:
    free = client.generate(PROMPT, max_new_tokens=9)[0].tolist()
    call: dict[str, Any] = {
        "stopping_criteria": [EosTokenCriteria(free[12])],
        "eos_token_id": free[8],
        "max_new_tokens": 9,
    }
    assert client.generate(PROMPT, **call)[0].tolist() == free[: free.index(free[12], 7) + 1]


class Asks(LogitsProcessor):
    """Generates again inside a generation."""

    def __init__(self, client: FlashClient) -> None:
        self._client = client
        self.answers: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        self.answers.append(self._client.generate(PROMPT[:, :3], max_new_tokens=2).tolist())
        return scores


def test_a_generation_inside_another(client: FlashClient) -> None:
    expected = client.generate(PROMPT, max_new_tokens=4)
    inner = client.generate(PROMPT[:, :3], max_new_tokens=2).tolist()
    asks = Asks(client)
    assert torch.equal(client.generate(PROMPT, max_new_tokens=4, logits_processor=[asks]), expected)
    assert asks.answers == [inner] * 4
    assert (client.stats().new_tokens, client.stats().steps) == (4, 4 + 8)


def test_a_callback_that_fails_is_told_as_it_is(client: FlashClient) -> None:
    def fail(row: int, ids: torch.Tensor) -> list[int]:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        client.generate(PROMPT, prefix_allowed_tokens_fn=fail)
    assert client.generate(PROMPT, max_new_tokens=1).shape == (1, 8)


def test_drafts_of_another_vocabulary(client: FlashClient, tmp_path: Path) -> None:
    draft = make_model(make_config("llama", 1, 32, 64, vocab_size=384), seed=3)
    draft.save_pretrained(tmp_path)
    expected = client.generate("hello", max_new_tokens=12)
    with pytest.raises(OptionError, match="different tokenizers"):
        client.generate("hello", assistant_model=draft)
    make_tokenizer().save_pretrained(tmp_path)
    assert client.generate("hello", max_new_tokens=12, assistant_model=tmp_path) == expected
    assert client.stats().drafted_tokens > 0
    assert (
        client.generate("hello", max_new_tokens=12, assistant_model=str(tmp_path), num_assistant_tokens=1) == expected
    )
    with pytest.raises(OptionError, match="num_assistant_tokens=16 must be from 1 to 15"):
        client.generate("hello", assistant_model=tmp_path, num_assistant_tokens=16)


def test_a_streamed_model_as_a_draft(clients: dict[str, FlashClient]) -> None:
    expected = clients["words"].generate(PROMPT, max_new_tokens=8)
    made = clients["words"].generate(PROMPT, max_new_tokens=8, assistant_model=clients["wordless"].model)
    assert torch.equal(made, expected)
    stats = clients["words"].stats()
    assert stats.accepted_tokens > 0
    assert stats.steps + stats.accepted_tokens == 8
    own = clients["words"].generate(PROMPT, max_new_tokens=8, assistant_model=clients["words"].model)
    assert torch.equal(own, expected)
