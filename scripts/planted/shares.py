"""Counts the published statistics in one layer, over a sequence of tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import flashclient  # isort: skip  # noqa: F401 - before torch, so that torch's idle threads do not spin
import numpy as np
import torch
from numpy.typing import NDArray

from flashclient.calibration.firing import PackedBits, unions
from flashclient.calibration.predictor_training import PairCounts

WINDOW = 4  # tokens of the paper's window


@dataclass(frozen=True)
class Shares:
    """Means over the tokens.

    Attributes:
        firing, predicted: shares of the neurons that fire and that are predicted.
        false_negatives: the share of the neurons that fire which is not predicted.
        false_positives: the share of the neurons that do not fire which is predicted.
        union: the shares of the neurons that are predicted for at least one of k tokens in a row, k from 1.
        new_per_token: the share of the neurons that is predicted for a token and for none of the four before it.
    """

    firing: float
    predicted: float
    false_negatives: float
    false_positives: float
    union: list[float]
    new_per_token: float


def shares_of(fires: NDArray[np.bool_], wants: NDArray[np.bool_]) -> Shares:
    """Counts the shares. Both are [tokens, neurons], with tokens in order, and more of them than UNION_TOKENS_MAX."""
    counts = PairCounts()
    counts.add(torch.from_numpy(fires), torch.from_numpy(wants))
    predicted = PackedBits(*wants.shape)
    predicted.put(0, torch.from_numpy(wants))
    union = [float(share) for share in unions(predicted, len(wants))]
    return Shares(**asdict(counts.rates()), union=union, new_per_token=union[WINDOW] - union[WINDOW - 1])
