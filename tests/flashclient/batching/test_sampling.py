"""How tokens are picked from logits."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from flashclient.batching.sampling import Sampler, Sampling

LOGITS = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0])


def picks(count: int = 400, logits: torch.Tensor = LOGITS, **fields: Any) -> Counter[int]:
    sampler = Sampler(Sampling(**{"seed": 1} | fields), [0])
    return Counter(sampler.pick(logits).token for _ in range(count))


def test_temperature_zero_takes_the_likeliest() -> None:
    assert picks(5, temperature=0.0) == {3: 5}


def test_frequencies_are_the_probabilities() -> None:
    counted, shares = picks(4000), LOGITS.softmax(-1)
    for token, share in enumerate(shares.tolist()):
        assert counted[token] / 4000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [({"top_k": 2}, {2, 3}), ({"top_p": 0.5}, {3}), ({"min_p": 0.3}, {2, 3}), ({"logit_bias": {0: 100.0}}, {0})],
)
def test_what_may_be_picked(fields: dict[str, Any], allowed: set[int]) -> None:
    assert set(picks(**fields)) == allowed


def test_a_seed_decides_alone() -> None:
    assert picks(20, seed=5) == picks(20, seed=5)
    one, other = (Sampler(Sampling(seed=5), [0]) for _ in range(2))
    tokens = [(one.pick(LOGITS).token, other.pick(LOGITS).token) for _ in range(20)]
    assert all(a == b for a, b in tokens)


def test_penalties_count_what_was_made() -> None:
    sampler = Sampler(Sampling(temperature=0.0, presence_penalty=0.6, frequency_penalty=0.5), [3, 3, 3])
    assert [sampler.pick(LOGITS).token for _ in range(3)] == [3, 2, 3]


def test_a_repetition_penalty_counts_the_prompt_too() -> None:
    assert Sampler(Sampling(temperature=0.0, repetition_penalty=2.0), [3]).pick(LOGITS).token == 2


def test_logarithms_are_those_of_the_model() -> None:
    picked = Sampler(Sampling(temperature=0.0, logit_bias={3: -100.0}, top_logprobs=2), [0]).pick(LOGITS)
    logprobs = LOGITS.log_softmax(-1)
    assert picked.token == 2
    assert picked.logprob == pytest.approx(float(logprobs[2]))
    assert [token for token, _ in picked.top] == [3, 2]
    assert math.exp(picked.top[0][1]) == pytest.approx(float(LOGITS.softmax(-1)[3]), rel=1e-5)
    assert Sampler(Sampling(temperature=0.0), [0]).pick(LOGITS).logprob is None


def test_the_models_own_values_are_the_defaults() -> None:
    config: Any = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, top_k=64)  # type: ignore[no-untyped-call]
    assert Sampling.of(config) == Sampling(temperature=0.7, top_p=0.9, top_k=64)
    assert Sampling.of(config, temperature=0.0, top_p=None) == Sampling(temperature=0.0, top_p=0.9, top_k=64)
