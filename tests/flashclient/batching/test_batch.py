"""Sequences that join and leave a batch compute, bit for bit, what they compute alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import VOCABULARY, make_config, make_model
from cut_model import clients_of, cut
from torch import Tensor

from flashclient import FlashClient
from flashclient.batching.batch import Batch, feed
from flashclient.kernels.growing_cache import GrowingCache
from flashclient.model.loaded import LoadedModel
from weightd_proto.modes import KV_INT8, KV_PLAIN

KINDS = {  # family, dtype
    "llama": ("llama", "float32"),
    "llama-bf16": ("llama", "bfloat16"),
    "gemma3": ("gemma3", "float32"),  # with windows of 16 tokens
    "mistral": ("mistral", "bfloat16"),
    "opt": ("opt", "float32"),  # with learned positions
    "qwen2": ("qwen2", "float16"),
}
LENGTHS = (1, 3, 15, 16, 17, 40)
STEPS = 24


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FlashClient]]:
    changes: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 16}}
    cuts = [
        cut(make_model(make_config(family, **changes.get(kind, {})), dtype), name=kind)
        for kind, (family, dtype) in KINDS.items()
    ]
    with clients_of(cuts, tmp_path_factory.mktemp("batch")) as made:
        yield made


def tokens_of(index: int) -> list[int]:
    """A prompt, and the tokens after it."""
    length = LENGTHS[index % len(LENGTHS)] + STEPS
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(index)).tolist()


def prefilled(loaded: LoadedModel, *rows: list[int]) -> GrowingCache:
    cache = loaded.new_cache()
    feed(loaded.model, rows, cache, [0] * len(rows))
    return cache


def alone(loaded: LoadedModel, index: int) -> list[Tensor]:
    """The logits after each token behind the prompt."""
    tokens = tokens_of(index)
    cache, model = prefilled(loaded, tokens[:-STEPS]), loaded.model
    length = len(tokens) - STEPS
    return [feed(model, [[token]], cache, [length + step])[0] for step, token in enumerate(tokens[-STEPS:])]


@pytest.mark.parametrize(
    ("kind", "kv_dtype"), [*((kind, KV_PLAIN) for kind in KINDS), ("gemma3", KV_INT8), ("opt", KV_INT8)]
)
def test_rows_that_come_and_go(clients: dict[str, FlashClient], kind: str, kv_dtype: str) -> None:
    loaded = replace(clients[kind].loaded, kv_dtype=kv_dtype)
    chance = random.Random(kind)
    expected = {index: alone(loaded, index) for index in range(2 * len(LENGTHS))}
    waiting = list(expected)
    chance.shuffle(waiting)
    batch = Batch(loaded)
    running: list[tuple[int, int]] = []  # index, and steps done
    seen = 0
    while waiting or running:
        while waiting and (not running or (len(running) < 5 and chance.random() < 0.4)):
            indices = [waiting.pop() for _ in range(min(len(waiting), chance.choice((1, 1, 2, 3))))]
            prompts = [tokens_of(index)[:-STEPS] for index in indices]
            batch.join(prefilled(loaded, *prompts), list(map(len, prompts)))
            running += [(index, 0) for index in indices]
        logits = batch.step([tokens_of(index)[done - STEPS] for index, done in running])
        for row, (index, done) in enumerate(running):
            assert torch.equal(logits[row], expected[index][done]), f"step {done} of sequence {index}"
            seen += 1
        running = [(index, done + 1) for index, done in running]
        gone = {row for row, (_, done) in enumerate(running) if done == STEPS or chance.random() < 0.03}
        batch.leave(gone)  # finished, or the reader has gone
        running = [one for row, one in enumerate(running) if row not in gone]
        assert batch.rows == len(running)
    assert seen > 100


def test_states_of_another_kind_cannot_join() -> None:
    assert GrowingCache(make_config("gemma3")).holds_tokens
    cache: Any = GrowingCache(make_config("llama"))
    cache.layers[0] = object()
    assert not cache.holds_tokens
