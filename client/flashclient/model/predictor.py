"""Which neurons of a layer are likely to fire for an input: the predictors of a calibration, as kernels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashclient._native import Ffn, LowRankPredictor, SignPredictor, Workers
from flashclient.model.predictor_file import Predictor, Signs, read_predictors
from weightd_proto import weightd_pb2

ROWS_MAX = Ffn.TOKENS_MAX  # of one prediction: a bit each in a mask of 16


class Predictors:
    """One for each layer; what a row wants depends on that row alone.

    Args:
        data: the whole of predictors.safetensors, which is read where it lies.

    Raises:
        CalibrationError: it is not a file for this model.
    """

    def __init__(self, data: NDArray[np.uint8], model: weightd_pb2.Model, workers: Workers) -> None:
        found = read_predictors(data, model)
        self._layers = [_kernel(predictor, model.compute_dtype, workers) for predictor in found]
        self._neurons = [layer.neurons for layer in model.layers]

    def predict(self, layer: int, x: NDArray[np.float32]) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
        """What x [rows, hidden_size], at most ROWS_MAX rows, wants.

        Returns:
            Positions [n] that some row wants, rising, and for each a mask [n]: bit t, row t wants it.
        """
        return self._layers[layer].predict(x)

    def row_masks(self, layer: int, x: NDArray[np.float32]) -> NDArray[np.uint16]:
        """The same for any number of rows: [ceil(rows / ROWS_MAX), neurons], by position."""
        wanted = np.zeros((-(-len(x) // ROWS_MAX), self._neurons[layer]), np.uint16)
        for group, of_group in enumerate(wanted):
            positions, masks = self.predict(layer, x[group * ROWS_MAX : (group + 1) * ROWS_MAX])
            of_group[positions] = masks
        return wanted


def _kernel(predictor: Predictor, dtype: str, workers: Workers) -> LowRankPredictor | SignPredictor:
    if isinstance(predictor, Signs):
        return SignPredictor(workers, predictor.signs, predictor.margin)
    return LowRankPredictor(workers, dtype, predictor.input, predictor.output, predictor.bias, predictor.scale)
