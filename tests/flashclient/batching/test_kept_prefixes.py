"""Prompts that begin with tokens of earlier ones compute, bit for bit, what they compute alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from checkpoints import VOCABULARY, make_config, make_model
from cut_model import clients_of, cut

from flashclient import FlashClient
from flashclient.batching.batch import feed
from flashclient.batching.kept_prefixes import KeptPrefixes
from flashclient.kernels.growing_cache import GrowingCache

KINDS = {"llama": "float32", "gemma3": "float32", "opt": "bfloat16"}  # gemma3 has windows of 16 tokens


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FlashClient]]:
    cuts = [cut(make_model(make_config(family), dtype), name=family) for family, dtype in KINDS.items()]
    with clients_of(cuts, tmp_path_factory.mktemp("prefixes")) as made:
        yield made


def filled(model: Any, tokens: list[int]) -> GrowingCache:
    cache = GrowingCache(model.config)
    feed(model, [tokens], cache, [0])
    return cache


def conversations(chance: random.Random) -> list[list[int]]:
    """Prompts that have beginnings in common."""
    made: list[list[int]] = [[]]
    for _ in range(40):
        start = chance.choice(made)
        more = [chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, 30))]
        made.append(start[: chance.randint(0, len(start))] + more)
    return made[1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bound", [10_000, 150])
def test_what_is_kept_changes_no_bit(clients: dict[str, FlashClient], kind: str, bound: int) -> None:
    model, chance = clients[kind].model, random.Random(bound)
    kept = KeptPrefixes(model.config, bound)
    reused = 0
    for prompt in conversations(chance):
        length = kept.usable(prompt, len(prompt) - 1)
        cache = kept.begin([prompt], [length])
        logits = feed(model, [prompt[length:]], cache, [length])
        assert torch.equal(logits, feed(model, [prompt], GrowingCache(model.config), [0]))
        kept.keep(prompt, cache, 0)
        assert kept.tokens <= bound
        reused += length
        assert kept.usable(prompt, len(prompt)) == (len(prompt) if len(prompt) <= bound else 0)
    assert reused > 50


def test_rows_that_continue_different_beginnings(clients: dict[str, FlashClient]) -> None:
    model = clients["llama"].model
    kept = KeptPrefixes(model.config, 1000)
    prompts = [list(range(5, 5 + length)) + [number] * 4 for number, length in enumerate((20, 9, 0, 31), 3)]
    for prompt in prompts:
        kept.keep(prompt, filled(model, prompt), 0)
    starts = [len(prompt) - 4 for prompt in prompts]
    logits = feed(model, [prompt[-4:] for prompt in prompts], kept.begin(prompts, starts), starts)
    for row, prompt in enumerate(prompts):
        assert torch.equal(logits[row], feed(model, [prompt], GrowingCache(model.config), [0])[0])


def test_the_least_recently_used_goes_first(clients: dict[str, FlashClient]) -> None:
    model = clients["llama"].model
    kept = KeptPrefixes(model.config, 30)
    first, second, third = ([token] * 10 for token in (5, 6, 7))
    for prompt in (first, second, third):
        kept.keep(prompt, filled(model, prompt), 0)
    kept.begin([first], [10])
    kept.keep([8] * 10, filled(model, [8] * 10), 0)
    assert [kept.usable(prompt, 10) for prompt in (first, second, third)] == [10, 0, 10]
    kept.keep([9] * 31, filled(model, [9] * 31), 0)
    assert kept.usable([9] * 31, 31) == 0, "it is longer than the bound"
    kept.bound(0)
    assert kept.tokens == 0


def test_owners_share_nothing(clients: dict[str, FlashClient]) -> None:
    model, prompt = clients["llama"].model, [5] * 10
    kept = KeptPrefixes(model.config, 30)
    kept.keep(prompt, filled(model, prompt), 0, owner=1)
    assert [kept.usable(prompt, 10, owner) for owner in (0, 1, 2)] == [0, 10, 0]
    kept.keep(prompt, filled(model, prompt), 0, owner=2)
    assert kept.tokens == 20
    logits = feed(model, [[6], [6]], kept.begin([prompt, prompt], [10, 10], [1, 2]), [10, 10])
    assert torch.equal(logits[0], logits[1])
    kept.bound(15)
    assert [kept.usable(prompt, 10, owner) for owner in (1, 2)] == [0, 10]
    kept.keep([7] * 10, filled(model, [7] * 10), 0)
    kept.keep([8] * 16, filled(model, [8] * 16), 0)
    assert kept.tokens == kept.usable([7] * 10, 10) == 10


def test_windows_are_continued_only_where_they_are_whole(clients: dict[str, FlashClient]) -> None:
    model = clients["gemma3"].model
    kept = KeptPrefixes(model.config, 1000)
    prompt = list(range(3, 83))
    kept.keep(prompt, filled(model, prompt), 0)
    assert kept.usable(prompt, 80) == 80
    assert kept.usable(prompt, 79) == 0, "the window before token 79 has lost a token"
    kept.keep(prompt[:40], filled(model, prompt[:40]), 0)
    assert kept.usable(prompt, 79) == 40, "they were known, and now with their window"


def test_states_of_another_kind_are_not_kept() -> None:
    cache = GrowingCache(make_config("llama"))
    kept = KeptPrefixes(make_config("llama"), 0)
    kept.keep([5, 6], cache, 0)
    assert kept.tokens == kept.usable([5, 6], 2) == 0
