"""Kinds of prompts, their padding and length: the dense model's result, or one clear error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_config, make_model, make_tokenizer
from cut_model import clients_of, cut
from torch import Tensor
from transformers import GenerationConfig, pipeline

from flashclient import FlashClient
from flashclient.errors import OptionError

NEW: dict[str, Any] = {"max_new_tokens": 5}
ROW = [5, 17, 200, 31, 8, 44]
RAGGED = [ROW, [60, 7, 118]]
IDS = torch.tensor([ROW, [0, 0, 0, 60, 7, 118]])
MASK = torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1]])


@pytest.fixture(scope="module")
def dense() -> dict[str, Any]:
    models = {family: make_model(make_config(family), seed=5) for family in ("llama", "opt")}
    for model in models.values():
        model.generation_config.eos_token_id = None  # random weights may end a text at once
    return models


@pytest.fixture(scope="module")
def clients(dense: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FlashClient]]:
    cuts = [cut(model, make_tokenizer(), name) for name, model in dense.items()]
    with clients_of(cuts, tmp_path_factory.mktemp("prompts")) as made:
        yield made


@pytest.fixture
def client(clients: dict[str, FlashClient]) -> FlashClient:
    return clients["llama"]


def rows(output: Any) -> list[list[int]]:
    plain: Any = output.tolist() if isinstance(output, Tensor | np.ndarray) else output
    return plain if isinstance(plain[0], list) else [plain]


EQUAL = torch.tensor([ROW, [60, 7, 118, 9, 9, 4]])


@pytest.mark.parametrize(
    "prompt",
    [
        EQUAL,
        EQUAL.int(),
        EQUAL.numpy(),
        EQUAL.tolist(),
        tuple(map(tuple, EQUAL.tolist())),
        list(EQUAL),
        list(EQUAL.numpy()),
        [[np.int64(one) for one in row] for row in EQUAL.tolist()],
        {"input_ids": EQUAL.tolist(), "attention_mask": torch.ones_like(EQUAL).tolist()},
        {"input_ids": EQUAL.numpy(), "token_type_ids": torch.zeros_like(EQUAL).numpy()},
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_ids_of_every_kind_are_the_same_prompt(client: FlashClient, dense: dict[str, Any], prompt: Any) -> None:
    expected = dense["llama"].generate(EQUAL, **NEW).tolist()
    assert rows(client.generate(prompt, **NEW)) == expected
    given = prompt if isinstance(prompt, dict) else {"input_ids": prompt}
    assert rows(client.generate(**given, **NEW)) == expected
    model: Any = client.model
    assert model.generate(**given, **NEW).tolist() == expected


def test_the_kind_comes_back(client: FlashClient) -> None:
    assert isinstance(client.generate(np.array(ROW), **NEW), np.ndarray)
    assert client.generate(np.array(ROW), **NEW).ndim == 1
    assert client.generate(input_ids=torch.tensor(ROW), **NEW).dim() == 1
    assert isinstance(client.generate(client.tokenizer("hello"), **NEW)[0], int)
    assert client.generate(client.tokenizer("hello", return_tensors="np"), **NEW).shape == (1, 9)
    one_row = {"input_ids": torch.tensor(ROW), "attention_mask": torch.ones(len(ROW))}
    assert client.generate(one_row, **NEW).shape == (len(ROW) + 5,)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_lists_of_different_lengths(clients: dict[str, FlashClient], dense: dict[str, Any], family: str) -> None:
    expected = dense[family].generate(IDS, attention_mask=MASK, **NEW).tolist()
    made = clients[family].generate(RAGGED, **NEW)
    assert made == [expected[0], expected[1][3:]]  # without its padding
    masked = {"input_ids": RAGGED, "attention_mask": [[1] * 6, [1] * 3]}
    assert clients[family].generate(masked, **NEW) == made
    assert clients[family].generate(RAGGED, **NEW, num_beams=2, num_return_sequences=2)[0][:6] == ROW


def _mask(*zeros: int, row: int = 1) -> Tensor:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[row, list(zeros)] = 0
    return mask


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(
    "mask",
    [
        None,  # derived from the padding
        MASK,
        MASK.bool(),
        MASK.float(),
        MASK.int(),
        _mask(3, 4, 5),  # on the right
        _mask(1, 3),  # with holes
        _mask(0),  # less than the padding
        _mask(0, 1, 2, 3),  # more
        _mask(*range(6)),  # nothing at all
    ],
    ids=["none", "left", "bool", "float", "int32", "right", "holes", "fewer", "more", "empty"],
)
def test_masks_are_what_they_are_to_the_dense_model(
    clients: dict[str, FlashClient], dense: dict[str, Any], family: str, mask: Tensor | None
) -> None:
    expected = dense[family].generate(IDS, attention_mask=mask, **NEW)
    assert torch.equal(clients[family].generate(IDS, attention_mask=mask, **NEW), expected)
    long = torch.cat([IDS] * 4, dim=1)  # more rows than decode's kernels take
    wide = None if mask is None else torch.cat([mask] * 4, dim=1)
    expected = dense[family].generate(long, attention_mask=wide, **NEW)
    assert torch.equal(clients[family].generate(long, attention_mask=wide, **NEW), expected)


@pytest.mark.parametrize("pad", [-1, None, 7, 5000])
def test_padding_that_is_no_token(clients: dict[str, FlashClient], dense: dict[str, Any], pad: int | None) -> None:
    """A pad_token_id of the model's own config. The dense model fails if one row ends before the others."""
    client, model = clients["opt"], dense["opt"]
    end = int(model.generate(EQUAL, **NEW)[0, 7])
    expected = model.generate(EQUAL, **NEW, eos_token_id=end, pad_token_id=end if pad != 7 else 7)
    before, client.model.generation_config.pad_token_id = client.model.generation_config.pad_token_id, pad
    try:
        assert torch.equal(client.generate(EQUAL, **NEW, eos_token_id=end), expected)
        made = [row[6:] for row in expected.tolist()]
        assert client.stats().new_tokens == sum(min(5, [*row, end].index(end) + 1) for row in made) < 10
        if pad not in (None, 7):
            with pytest.raises(
                OptionError, match=f"pad_token_id={pad} is not a token of the model, whose tokens are 0 to 319"
            ):
                client.generate(EQUAL, **NEW, eos_token_id=end, pad_token_id=pad)
    finally:
        client.model.generation_config.pad_token_id = before


@pytest.mark.parametrize("tokens", [244, 245, 246])
@pytest.mark.parametrize("spelling", ["max_new_tokens", "max_length", "generation_config", "own config"])
def test_a_fixed_context_is_not_exceeded(
    clients: dict[str, FlashClient], dense: dict[str, Any], tokens: int, spelling: str
) -> None:
    """OPT's context has 256 tokens. The last new token is not fed, so 245 of them fit after a prompt of 12."""
    client, ids = clients["opt"], torch.cat([EQUAL[:1]] * 2, dim=1)
    own = client.model.generation_config
    calls: dict[str, dict[str, Any]] = {
        "max_new_tokens": {"max_new_tokens": tokens},
        "max_length": {"max_length": 12 + tokens},
        "generation_config": {"generation_config": GenerationConfig(max_length=12 + tokens)},  # type: ignore[no-untyped-call]
        "own config": {},
    }
    own.max_length = 12 + tokens if spelling == "own config" else None
    before = client.clock.forward_s
    try:
        if tokens == 246:
            with pytest.raises(OptionError, match=r"prompt of 12 tokens and 246 new ones do not fit .* of 256 tokens"):
                client.generate(ids, **calls[spelling])
            assert client.clock.forward_s == before
        elif spelling == "max_new_tokens":
            expected = dense["opt"].generate(ids, **calls[spelling])
            assert torch.equal(client.generate(ids, **calls[spelling]), expected)
    finally:
        own.max_length = None


def test_padding_does_not_count(clients: dict[str, FlashClient], dense: dict[str, Any]) -> None:
    ids, mask = torch.full((1, 300), 9), torch.zeros(1, 300, dtype=torch.long)
    mask[0, -4:] = 1
    expected = dense["opt"].generate(ids, attention_mask=mask, **NEW)
    assert torch.equal(clients["opt"].generate(ids, attention_mask=mask, **NEW), expected)
    with pytest.raises(OptionError, match="prompt of 300 tokens"):
        clients["opt"].generate(ids, **NEW)
    with pytest.raises(OptionError, match="prompt of 251 tokens and 7 new ones"):
        clients["opt"].generate(ids[:, :6], position_ids=torch.arange(245, 251)[None], max_new_tokens=7)


def test_rotary_embeddings_go_on(client: FlashClient, dense: dict[str, Any]) -> None:
    """They work beyond the length of training; transformers warns and goes on."""
    ids = torch.cat([EQUAL[:1]] * 45, dim=1)  # 270 tokens; the config says 256
    assert torch.equal(client.generate(ids, **NEW), dense["llama"].generate(ids, **NEW))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": EQUAL, "input_ids": EQUAL}, "given twice, also as input_ids="),
        ({"inputs": EQUAL, "input_ids": EQUAL}, "two names for the prompt"),
        ({"prompt": {"input_ids": EQUAL, "attention_mask": MASK}, "attention_mask": MASK}, "mask is given twice"),
        ({"prompt": "text", "attention_mask": MASK}, "attention_mask= needs input_ids"),
        ({"prompt": EQUAL, "attention_mask": MASK[:, :4]}, r"of \[2, 4\] does not fit a prompt of \[2, 6\]"),
        ({"prompt": EQUAL, "attention_mask": MASK[:1]}, r"attention_mask of \[1, 6\] does not fit"),
        ({"prompt": EQUAL, "attention_mask": MASK[None]}, "attention_mask of"),
        ({"prompt": RAGGED, "attention_mask": [[1] * 6, [1] * 4]}, "differ in length"),
        ({"prompt": EQUAL, "attention_mask": "yes"}, "attention_mask is a str"),
        ({"prompt": torch.tensor([[5, 320]])}, "input_ids contain 320, and the model's tokens are 0 to 319"),
        ({"prompt": [[-1, 5]]}, "input_ids contain -1"),
        ({"prompt": EQUAL[None]}, "whole numbers"),
        ({"prompt": EQUAL, "token_type_ids": torch.ones_like(EQUAL)}, "has no argument 'token_type_ids'"),
        ({"inputs_embeds": torch.zeros(1, 3, 8)}, r"inputs_embeds have shape \(1, 3, 8\)"),
        ({"inputs_embeds": EQUAL}, "inputs_embeds have shape"),
        ({"prompt": object()}, "cannot generate from a object"),
        ({"prompt": "half \ud83d"}, r"it has the surrogate U\+D83D at character 5"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_refused(client: FlashClient, call: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        client.generate(**call, **NEW)


def test_embeddings_beside_ids(client: FlashClient, dense: dict[str, Any]) -> None:
    embeds = dense["llama"].get_input_embeddings()(EQUAL).detach()
    expected = dense["llama"].generate(EQUAL, inputs_embeds=embeds, **NEW)
    assert torch.equal(client.generate(EQUAL, inputs_embeds=embeds, **NEW), expected)
    assert client.stats().new_tokens == 10
    alone = client.generate({"inputs_embeds": embeds.double().numpy()}, **NEW)
    assert torch.equal(alone, expected[:, 6:])
    assert (client.stats().new_tokens, client.stats().prompt_tokens) == (10, 6)


def test_a_pipeline_of_transformers(client: FlashClient) -> None:
    generate: Any = pipeline("text-generation", model=client.model, tokenizer=client.tokenizer)
    made = generate("hello", do_sample=False, return_full_text=False, max_new_tokens=8)
    assert made[0]["generated_text"] == client.generate("hello", max_new_tokens=8)
    assert client.stats().new_tokens == 8
