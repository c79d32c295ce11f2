"""The predictors of a calibration, as kernels: which neurons of a layer are likely to fire for an input.

A row is said to want the neurons that are predicted for it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashclient import _native
from flashclient._native import Ffn, Workers
from flashclient.model.activations import activation_of
from flashclient.model.predictor_file import GateRows, Predictor, Signs, read_predictors
from weightd_proto import weightd_pb2

ROWS_MAX = Ffn.TOKENS_MAX  # of one prediction: the bits of a row mask


class Predictors:
    """The predictors of all layers. What a row wants depends on that row alone.

    Args:
        data: the whole of predictors.safetensors, which is read in place.

    Raises:
        CalibrationError: the file is not for this model.
    """

    def __init__(self, data: NDArray[np.uint8], model: weightd_pb2.Model, workers: Workers) -> None:
        found = read_predictors(data, model)
        self.layers = [_kernel(*of, model, workers) for of in zip(found, model.layers, strict=True)]
        self._neurons = [layer.neurons for layer in model.layers]

    def predict(self, layer: int, x: NDArray[np.float32]) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
        """The neurons that the rows of x [rows, hidden_size], at most ROWS_MAX, want.

        Returns:
            Positions [n] that some row wants, rising, and for each a mask [n]: bit t, row t wants it.
        """
        return self.layers[layer].predict(x)

    def row_masks(self, layer: int, x: NDArray[np.float32]) -> NDArray[np.uint16]:
        """The same for any number of rows: [ceil(rows / ROWS_MAX), neurons], by position."""
        wanted = np.zeros((-(-len(x) // ROWS_MAX), self._neurons[layer]), np.uint16)
        for group, of_group in enumerate(wanted):
            positions, masks = self.predict(layer, x[group * ROWS_MAX : (group + 1) * ROWS_MAX])
            of_group[positions] = masks
        return wanted


def _kernel(
    predictor: Predictor, layer: weightd_pb2.Layer, model: weightd_pb2.Model, workers: Workers
) -> _native.Predictor:
    if isinstance(predictor, Signs):
        return _native.SignPredictor(workers, predictor.signs, model.bundle.hidden_size, predictor.margin)
    if isinstance(predictor, GateRows):
        gate, scale, bias, threshold = predictor.gate, predictor.scale, predictor.bias, predictor.threshold
        return _native.GatePredictor(workers, gate, scale, bias, threshold, activation_of(model, layer))
    arrays = predictor.input, predictor.output, predictor.bias, predictor.scale
    return _native.LowRankPredictor(workers, model.compute_dtype, *arrays)
