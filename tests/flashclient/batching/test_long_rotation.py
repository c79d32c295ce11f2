"""Sequences whose tokens are rotated by other factors once they are long: each gets what transformers' model gives."""

from __future__ import annotations

import itertools
import queue
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_model, make_tokenizer
from cut_model import clients_of, cut
from transformers import Phi3Config, PreTrainedModel

from flashclient.batching.request import Progress, TextRequest
from flashclient.batching.sampling import Sampling
from flashclient.batching.scheduler import CHUNK_TOKENS, Scheduler

ANSWER_S = 60.0
SHORT = CHUNK_TOKENS + 20  # tokens, and no more, rotate by short factors
NEW = 6
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1}
LENGTHS = {"short": 12, "also short": 31, "becomes long": SHORT - 2, "long": SHORT + 9, "also long": 2 * SHORT}


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    rotation = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SHORT}
    rotation |= {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [4.0 + i for i in range(8)]}
    config = Phi3Config(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4 * SHORT, original_max_position_embeddings=SHORT,
        rope_parameters=rotation, pad_token_id=0, bos_token_id=1, eos_token_id=2, sliding_window=None,
    )  # fmt: skip
    model = make_model(config, seed=4)
    for name, parameter in model.named_parameters():
        if "qkv" in name:
            parameter.data.mul_(3)  # so that rotation matters
    return model


def prompt_of(length: int) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def asked(prompt: list[int]) -> tuple[TextRequest, queue.SimpleQueue[Progress]]:
    told: queue.SimpleQueue[Progress] = queue.SimpleQueue()
    fields: dict[str, Any] = {"sampling": Sampling(temperature=0.0), "ends": frozenset(), "stops": ()}
    return TextRequest(prompt, make_tokenizer(), tokens_max=NEW, tell=told.put, **fields), told


def made(told: queue.SimpleQueue[Progress]) -> list[int]:
    tokens = []
    while True:
        step = told.get(timeout=ANSWER_S)
        assert step.error is None
        tokens += [step.picked.token] if step.picked is not None else []
        if step.finished is not None:
            return tokens


def test_each_gets_what_transformers_gives(dense: Any, tmp_path: Path) -> None:
    prompts = [prompt_of(length) for length in LENGTHS.values()]
    expected = [dense.generate(torch.tensor([one]), **GREEDY)[0, len(one) :].tolist() for one in prompts]
    with clients_of([cut(dense, make_tokenizer())], tmp_path) as clients:
        client = clients["tiny"]
        assert client.loaded.short_tokens == SHORT
        got = [client.generate(torch.tensor([one]), **GREEDY)[0, len(one) :].tolist() for one in prompts]
        assert got == expected
        drafts: list[dict[str, Any]] = [{"assistant_model": dense}, {"prompt_lookup_num_tokens": 3}]
        for draft, (one, tokens) in itertools.product(drafts, zip(prompts, expected, strict=True)):
            drafted = client.generate(torch.tensor([one]), **GREEDY, **draft)
            assert drafted[0, len(one) :].tolist() == tokens
        scheduler = Scheduler(client.loaded)
        try:
            for order in (prompts, prompts[::-1], prompts):  # with what was kept before
                requests = [asked(prompt) for prompt in order]
                scheduler.submit(*(request for request, _ in requests))
                answers = [made(told) for _, told in requests]
                assert answers == [expected[prompts.index(prompt)] for prompt in order]
            again, told = asked(prompts[2] + expected[2])  # continues one that became long
            scheduler.submit(again)
            whole = dense.generate(torch.tensor([prompts[2] + expected[2]]), **GREEDY)
            assert made(told) == whole[0, -NEW:].tolist()
        finally:
            scheduler.close()
