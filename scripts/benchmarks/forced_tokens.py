"""Decodes a fixed sequence of random token ids, and measures the time of every token.

A model of random weights, like many real ones, repeats itself when it decodes greedily. Then the same neurons fire
again and again, which flatters every cache. Here the model computes as usual, but the next id is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

IDS_SPECIAL = 16  # ids below may mean "the end"


def random_ids(vocabulary: int, count: int, seed: int) -> list[int]:
    """Random ids, the same for every program that is compared."""
    drawn = np.random.default_rng(seed).integers(IDS_SPECIAL, vocabulary, count)
    return [int(one) for one in drawn]


class ForcedTokens(LogitsProcessor):
    """Makes generate() take `ids` one after the other.

    Args:
        between: called after the prompt and after each token, while the clock stands still.

    Attributes:
        seconds: the time of each forward pass and of what generate() does around it; the first is that of the prompt.
    """

    def __init__(self, ids: list[int], between: Callable[[], None] | None = None) -> None:
        self._ids = ids
        self._between = between or (lambda: None)
        self._started_s = time.perf_counter()
        self.seconds: list[float] = []

    def start(self) -> None:
        """Starts the clock of the first token."""
        self._started_s = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        self.seconds.append(time.perf_counter() - self._started_s)
        self._between()
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._ids[len(self.seconds) - 1]] = 0
        self.start()
        return forced
