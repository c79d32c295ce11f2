"""The FFNs of predict mode: each row computes the neurons that its own prediction wants, and no others.

For up to 16 rows a layer is one native call (client/native/predict/predict_step.h). More rows together want most of a
layer: it is streamed whole, and each row adds the same neurons in the same order.
"""

from __future__ import annotations

import threading
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashclient._native import Ffn, LayerFfn, PredictLayer, PredictStep, Window
from flashclient.kernels.arrays import array_of
from flashclient.model.ffn import Biases, Clock, ExactFFN, LayerFFN
from flashclient.model.predictor import ROWS_MAX, Predictors
from flashclient.model.step import Step, Steps
from flashclient.source.bundle_source import BundleSource


class PredictedFFN:
    """See ModelFFN. One call at a time.

    Args:
        exact: streams layers, for a generation's prompt and for many rows.
        window: of `source`.
    """

    def __init__(
        self,
        source: BundleSource,
        kernels: Ffn,
        predictors: Predictors,
        window: Window,
        steps: Steps,
        exact: ExactFFN,
        clock: Clock,
    ) -> None:
        self.source = source
        self.hidden_size = exact.hidden_size
        self.clock = clock
        self._exact = exact
        self._step = PredictStep(kernels, window, predictors.layers)
        self._predictors = predictors
        self._steps = steps
        self.lock = threading.Lock()
        self._natives: dict[int, PredictLayer] = {}  # by layer

    def __call__(self, layer: int, x: Tensor, biases: Biases) -> Tensor:
        """The sum over each row's neurons of `layer`; over all of them in the columns of a generation's prompt.

        Args:
            x: [tokens, hidden_size] fp32, contiguous.

        Returns:
            A new tensor [tokens, hidden_size] fp32.
        """
        step = self._steps.current(len(x))
        with self.lock:
            if step.exact_columns == 0:
                return self._predicted(layer, step, x, biases)
            if step.exact_columns == step.columns:
                return self._exact(layer, x, biases)
            of_columns = x.view(step.rows, step.columns, -1)
            y = torch.empty_like(of_columns)
            prompt, rest = slice(None, step.exact_columns), slice(step.exact_columns, None)
            rows = of_columns[:, prompt].reshape(-1, self.hidden_size)
            y[:, prompt] = self._exact(layer, rows, biases).view(step.rows, -1, self.hidden_size)
            rows = of_columns[:, rest].reshape(-1, self.hidden_size)
            y[:, rest] = self._predicted(layer, step.predicted(), rows, biases).view(step.rows, -1, self.hidden_size)
            return y.view(x.shape)

    def native(self, streamed: LayerFFN, rows: int) -> LayerFfn | None:
        step = self._steps.current(rows)
        if step.exact_columns == step.columns:
            return self._exact.native(streamed, rows)
        if step.exact_columns > 0 or rows > ROWS_MAX:
            return None
        made = self._natives.get(streamed.layer)
        if made is None:
            made = self._natives[streamed.layer] = PredictLayer(self._step, *streamed.arrays())
        made.at(step.past_tokens, step.columns, step.row_mask())
        return made

    def idle(self) -> None:
        """Gives back everything that is leased or being fetched ahead."""
        self.source.idle()

    def _predicted(self, layer: int, step: Step, x: Tensor, biases: Biases) -> Tensor:
        if len(x) > ROWS_MAX:
            return self._exact(layer, x, biases, self._row_masks(layer, step, x))
        y = torch.empty_like(x)
        rows = array_of(x), array_of(y)
        with self.source.errors:
            times = self._step.run(layer, step.past_tokens, step.columns, step.row_mask(), biases, *rows)
        self.clock.add(*times)
        return y

    def _row_masks(self, layer: int, step: Step, x: Tensor) -> NDArray[np.uint16]:
        started_s = perf_counter()
        masks = self._predictors.row_masks(layer, x.numpy())
        if step.wants is not None:
            masks &= step.row_masks()[:, None]
        self.clock.add(predict_s=perf_counter() - started_s)
        return masks
