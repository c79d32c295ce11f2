"""Picks the tokens of one sequence from its logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flashclient.batching.constraint import Constraint

TOP_LOGPROBS_MAX = 20
TEMPERATURE_MIN = 1e-4  # below it, the likeliest token is certain
OF_A_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # what a generation config may set
NO_TOKENS = torch.zeros(1, 0, dtype=torch.long)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The values are those of transformers' generate() and of the OpenAI interface.

    Attributes:
        temperature: 0 takes the likeliest token.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens that were made already: once, and as
            often as they were made.
        logit_bias: added to the logits of these tokens.
        seed: None is a random one.
        top_logprobs: alternatives of each token to report; None: not even the token's own logarithm.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    top_logprobs: int | None = None

    @classmethod
    def of(cls, config: GenerationConfig, **given: Any) -> Sampling:
        """Values that are given, else those of a model's generation config."""
        own = {name: getattr(config, name, None) for name in OF_A_MODEL}
        set_values = [{name: value for name, value in one.items() if value is not None} for one in (own, given)]
        return cls(**(set_values[0] | set_values[1]))


@dataclass(frozen=True)
class Picked:
    """A token, the logarithm of its probability, and the likeliest tokens with theirs, as far as they are wanted."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Picks the tokens of one sequence. What it picks depends on the sequence and the seed alone.

    Attributes:
        tokens: the prompt, and those that were picked.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], constraint: Constraint | None = None) -> None:
        self._sampling = sampling
        self._constraint = constraint
        self.tokens = list(prompt)
        self._made: Counter[int] = Counter()
        self._warpers = _warpers(sampling)
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def pick(self, logits: Tensor) -> Picked:
        """The next token. logits: [vocabulary]."""
        logits = logits.float()
        scores = self._adjusted(logits)
        if self._constraint is not None:
            scores = scores.masked_fill(~self._constraint.allowed(), -torch.inf)
        if self._warpers:
            # Only a penalty for repetition reads the tokens, and making a tensor of them takes long.
            tokens = torch.tensor([self.tokens]) if self._sampling.repetition_penalty != 1.0 else NO_TOKENS
            scores = self._warpers(tokens, scores[None])[0]  # type: ignore[arg-type]
        if self._sampling.temperature < TEMPERATURE_MIN:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._random))
        self.tokens.append(token)
        self._made[token] += 1
        if self._constraint is not None:
            self._constraint.take(token)
        return self._with_logprobs(token, logits)

    def _adjusted(self, logits: Tensor) -> Tensor:
        """With the OpenAI interface's penalties and biases."""
        sampling = self._sampling
        penalises = self._made and (sampling.presence_penalty or sampling.frequency_penalty)
        if not penalises and not sampling.logit_bias:
            return logits
        scores = logits.clone()
        if penalises:
            for token, count in self._made.items():
                scores[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
        for token, bias in sampling.logit_bias.items():
            scores[token] += bias
        return scores

    def _with_logprobs(self, token: int, logits: Tensor) -> Picked:
        wanted = self._sampling.top_logprobs
        if wanted is None:
            return Picked(token)
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(min(wanted, len(logprobs))) if wanted else None
        likeliest = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Picked(token, float(logprobs[token]), likeliest)


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    warpers: list[Any] = []
    if sampling.repetition_penalty != 1.0:
        warpers.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature >= TEMPERATURE_MIN:
        if sampling.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            warpers.append(MinPLogitsWarper(sampling.min_p))
    return LogitsProcessorList(warpers)
