"""How often neurons are predicted and fire, in modes predict and threshold: as calibrated, or as assumed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightd.errors import StoreError
from weightd.planning.outline import stored_bytes
from weightd.store.hotness import calibrated_shares
from weightd.store.store import Store
from weightd_proto.files import PREDICTORS_FILE
from weightd_proto.weightd_pb2 import Model

# Of OPT-6.7B in "LLM in a flash" (arXiv 2312.11514), as scripts/planted/plan.py: the shape of the Beta distribution of
# neurons' predicted shares, how many of the predicted neurons fire, and what the predictors take of the model.
SPREAD = 0.188
FIRES_OF_PREDICTED = 0.33
PREDICTORS_SHARE = 0.0125
SAMPLES_A_NEURON = 16


@dataclass(frozen=True)
class Firing:
    """Shares of the tokens at which each neuron is predicted and fires, in the order of all layers' positions.

    Attributes:
        window: tokens whose neurons stay leased.
    """

    predicted: npt.NDArray[np.float64]
    fires: npt.NDArray[np.float64]
    window: int


def calibrated_firing(store: Store, record: Model, window: int) -> Firing:
    """Raises StoreError where the model has no calibration, CheckpointError, OSError."""
    if not record.HasField("calibration"):
        raise StoreError(
            f"{record.name} is not calibrated, so that nothing is known of its neurons: run `flashclient calibrate`, "
            "or assume a share with --firing"
        )
    predicted, fires = (
        np.concatenate(calibrated_shares(store, record, name)).astype(np.float64) for name in ("predicted", "frequency")
    )
    return Firing(predicted, fires, window)


def assumed_firing(record: Model, share: float, window: int) -> tuple[Firing, Model]:
    """Firing where a token predicts `share` of the neurons, and the record with predictors as large as published."""
    count = sum(layer.neurons for layer in record.layers)
    drawn = np.random.default_rng(0).beta(SPREAD, SPREAD * (1 - share) / share, count * SAMPLES_A_NEURON)
    predicted = np.sort(drawn)[SAMPLES_A_NEURON // 2 :: SAMPLES_A_NEURON]
    predicted = np.random.default_rng(0).permutation(predicted)  # neurons that share a cell are not alike
    with_predictors = Model()
    with_predictors.CopyFrom(record)
    model_bytes = stored_bytes(record)
    with_predictors.calibration.files.add(name=PREDICTORS_FILE, size_bytes=int(model_bytes * PREDICTORS_SHARE))
    return Firing(predicted, predicted * FIRES_OF_PREDICTED, window), with_predictors
