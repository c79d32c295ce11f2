"""What the published statistics count, of one layer and a sequence of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNION_TOKENS_MAX = 8
WINDOW = 4  # the paper's


@dataclass(frozen=True)
class Shares:
    """Means over the tokens.

    Attributes:
        firing, predicted: of the neurons.
        false_negatives: of those that fire, not predicted.
        false_positives: of those that do not fire, predicted.
        union: of the neurons, in the predicted sets of k tokens in a row, k from 1.
        new_per_token: of the neurons, predicted for a token and for none of the four before it.
    """

    firing: float
    predicted: float
    false_negatives: float
    false_positives: float
    union: list[float]
    new_per_token: float


def shares_of(fires: NDArray[np.bool_], wants: NDArray[np.bool_]) -> Shares:
    """Both [tokens, neurons], tokens in order and more than UNION_TOKENS_MAX."""
    union = [union_share(wants, tokens) for tokens in range(1, UNION_TOKENS_MAX + 1)]
    return Shares(
        firing=float(fires.mean()),
        predicted=float(wants.mean()),
        false_negatives=float((fires & ~wants).sum() / max(1, fires.sum())),
        false_positives=float((wants & ~fires).sum() / max(1, (~fires).sum())),
        union=union,
        new_per_token=union[WINDOW] - union[WINDOW - 1],
    )


def union_share(wants: NDArray[np.bool_], tokens: int) -> float:
    """Mean share of the neurons that are in the union of `tokens` tokens in a row. wants: [tokens, neurons]."""
    together = wants[tokens - 1 :].copy()
    for back in range(1, tokens):
        together |= wants[tokens - 1 - back : len(wants) - back]
    return float(together.mean())
