"""What the published statistics count, of one layer and a sequence of tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import flashclient  # isort: skip  # noqa: F401 - before torch, so that torch's idle threads do not spin
import numpy as np
import torch
from numpy.typing import NDArray

from flashclient.calibration.firing import PackedBits, unions
from flashclient.calibration.predictor_training import PairCounts

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
    counts = PairCounts()
    counts.add(torch.from_numpy(fires), torch.from_numpy(wants))
    predicted = PackedBits(*wants.shape)
    predicted.put(0, torch.from_numpy(wants))
    union = [float(share) for share in unions(predicted, len(wants))]
    return Shares(**asdict(counts.rates()), union=union, new_per_token=union[WINDOW] - union[WINDOW - 1])
