"""The FFN of predict mode: each row computes the neurons that its own prediction wants, and no others.

A step of one layer, for up to 16 rows: predict, slide the window, fire what is present, fire what arrives, accumulate
in order. Which bundles are there first changes the order in which neurons fire, and nothing else: every neuron's h is a
dot product of its own, and the down columns are added in rising position afterwards. So what a row computes depends
neither on window, pool and transport nor on its batch-mates. More rows than 16 want most of a layer between them: it is
streamed whole, and each row adds the same neurons in the same order.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashclient._native import locate
from flashclient.model.ffn import ExactFFN
from flashclient.model.predictor import ROWS_MAX, Predictors
from flashclient.model.step import Step, Steps
from flashclient.model.window import LeasedWindow
from flashclient.source.border import LeaseRefusedError

Bias = NDArray[np.float32] | None  # by position; in a list, by entry


@dataclass(frozen=True)
class _Wanted:
    """A list of neurons in rising position, which rows want each (a bit per row), and their biases."""

    positions: NDArray[np.uint32]
    masks: NDArray[np.uint16]
    bias: Bias

    def part(self, part: slice) -> _Wanted:
        return _Wanted(self.positions[part], self.masks[part], None if self.bias is None else self.bias[part])


class PredictedFFN:
    """What all layers of a model in predict mode share. One call at a time.

    Args:
        exact: sums over streamed layers, for a generation's prompt and for many rows.
    """

    def __init__(self, exact: ExactFFN, predictors: Predictors, window: LeasedWindow, steps: Steps) -> None:
        self.hidden_size = exact.hidden_size
        self.clock = exact.clock
        self._exact = exact
        self.source = exact.source
        self._kernels = exact.kernels
        self._predictors = predictors
        self._window = window
        self._steps = steps
        self._lock = threading.Lock()

    def __call__(self, layer: int, x: Tensor, bias: Bias) -> Tensor:
        """The sum over each row's neurons of `layer`; all of them in the columns of a generation's prompt.

        Args:
            x: [tokens, hidden_size] fp32, contiguous.
            bias: [neurons] fp32, by position, added before the activation.

        Returns:
            [tokens, hidden_size] fp32, fresh.
        """
        step = self._steps.current(len(x))
        with self._lock:
            if step.exact_columns == 0:
                return self._predicted(layer, step, x, bias)
            if step.exact_columns == step.columns:
                return self._streamed(layer, x, bias)
            of_columns = x.view(step.rows, step.columns, -1)
            y = torch.empty_like(of_columns)
            prompt, rest = slice(None, step.exact_columns), slice(step.exact_columns, None)
            rows = of_columns[:, prompt].reshape(-1, self.hidden_size)
            y[:, prompt] = self._streamed(layer, rows, bias).view(step.rows, -1, self.hidden_size)
            rows = of_columns[:, rest].reshape(-1, self.hidden_size)
            y[:, rest] = self._predicted(layer, step.predicted(), rows, bias).view(step.rows, -1, self.hidden_size)
            return y.view(x.shape)

    def idle(self) -> None:
        """Lets go of all that the window holds."""
        self._window.clear()

    def _streamed(self, layer: int, x: Tensor, bias: Bias, row_masks: NDArray[np.uint16] | None = None) -> Tensor:
        if self.source.cells_held > 0:
            self._window.clear()
        return self._exact(layer, x, bias, row_masks)

    def _predicted(self, layer: int, step: Step, x: Tensor, bias: Bias) -> Tensor:
        if len(x) > ROWS_MAX:
            return self._streamed(layer, x, bias, self._row_masks(layer, step, x))
        started_s = perf_counter()
        rows = x.numpy()
        positions, masks = self._predictors.predict(layer, rows)
        if step.wants is not None:
            masks &= step.row_masks()
            positions, masks = positions[masks != 0], masks[masks != 0]
        predicted_s = perf_counter()
        self.clock.predict_s += predicted_s - started_s
        fits = self._window.slide(layer, step, positions, masks)
        self.clock.acquire_s += perf_counter() - predicted_s
        y = torch.zeros_like(x)
        wanted = _Wanted(positions, masks, None if bias is None else bias[positions])
        if fits and self._added(layer, wanted, rows, y.numpy()):
            self._window.end_step(layer)
        else:
            self._add_in_pieces(layer, wanted, rows, y.numpy())
        return y

    def _added(self, layer: int, wanted: _Wanted, x: NDArray[np.float32], y: NDArray[np.float32]) -> bool:
        """Adds what the rows want, computing while it arrives; False, with y as it was, if a lease was refused."""
        table, source = self.source.addresses(layer), self.source
        positions = wanted.positions
        addresses, found = np.zeros(len(positions), np.uint64), np.empty(len(positions), np.uint32)
        h = np.empty((len(positions), len(x)), np.float32)
        missing, coming = len(positions), 1
        while True:
            begun_s = perf_counter()
            count = locate(table, positions, source.bundles_per_cell, source.stride_bytes, addresses, found)
            if count:
                self._kernels.fire(addresses, found[:count], wanted.masks, wanted.bias, x, h)
                missing -= count
            fired_s = perf_counter()
            self.clock.compute_s += fired_s - begun_s
            if missing == 0:
                break
            assert coming > 0, "the window and the source differ on what is held"
            try:
                coming = source.arrived()
            except LeaseRefusedError:
                self._window.clear()
                return False
            finally:
                self.clock.wait_s += perf_counter() - fired_s
        self._kernels.accumulate(addresses, h, y)
        self.clock.compute_s += perf_counter() - fired_s
        return True

    def _add_in_pieces(self, layer: int, wanted: _Wanted, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
        """For a step that wants more than may be held at once: one part after the other, to the same bits."""
        for piece in self._window.pieces(wanted.positions):
            part = wanted.part(piece)
            asked_s = perf_counter()
            cells = self._window.take_piece(layer, part.positions)
            self.clock.acquire_s += perf_counter() - asked_s
            added = self._added(layer, part, x, y)
            assert added, "a cell within the share was refused"
            self._window.give_back_piece(layer, cells)

    def _row_masks(self, layer: int, step: Step, x: Tensor) -> NDArray[np.uint16]:
        started_s = perf_counter()
        masks = self._predictors.row_masks(layer, x.numpy())
        if step.wants is not None:
            masks &= step.row_masks()[:, None]
        self.clock.predict_s += perf_counter() - started_s
        return masks
