"""The window at work: what a step wants is leased, what the last k tokens wanted stays leased.

Windowing as in LLM in a flash (arXiv 2312.11514, section 3.1); which cells that are is native (window.h). What is held
changes what is read, never what is computed.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from flashclient._native import Window
from flashclient.model.step import Step
from flashclient.source.border import BundleSource
from weightd_proto import weightd_pb2

_NONE = np.empty(0, np.uint32)


class LeasedWindow:
    """Moves the leases of `source` along with the tokens.

    Args:
        tokens: k, that of the step included; with 0 every step gives back what it acquired.
    """

    def __init__(self, source: BundleSource, model: weightd_pb2.Model, tokens: int) -> None:
        self._source = source
        self._tokens = tokens
        cells = [-(-layer.neurons // source.bundles_per_cell) for layer in model.layers]
        self._window = Window(tokens, source.bundles_per_cell, cells)
        self._acquired = _NONE  # by the step under way

    def slide(self, layer: int, step: Step, positions: NDArray[np.uint32], masks: NDArray[np.uint16]) -> bool:
        """Asks for what the step wants and is not held, and gives back what left the window; does not wait.

        Returns:
            False where the step alone wants more than may be held: nothing is held then, and nothing asked for.
        """
        source = self._source
        if self._window.cells_held != source.cells_held:  # a step ended early, or somebody else used the source
            self.clear()
        slid = self._window.slide(layer, step.past_tokens, step.columns, positions, masks, source.lease_limit)
        if slid is None:
            source.idle()
            return False
        acquire, release, elsewhere = slid
        for other, cells in elsewhere:
            source.exchange(other, _NONE, cells)
        if len(acquire) or len(release):
            source.exchange(layer, acquire, release)
        self._acquired = acquire
        return True

    def end_step(self, layer: int) -> None:
        """The step has been computed."""
        if self._tokens == 0:
            self._window.clear()
            self._source.exchange(layer, _NONE, self._acquired)

    def pieces(self, positions: NDArray[np.uint32]) -> list[slice]:
        """Cuts a step's list into parts whose cells the source can always hold at once."""
        cells = positions // np.uint32(self._source.bundles_per_cell)
        firsts = np.flatnonzero(np.diff(cells, prepend=np.uint32(2**32 - 1)))  # entries that begin a cell
        borders = [*firsts[:: self._source.share_cells].tolist(), len(positions)]
        return [slice(begin, end) for begin, end in pairwise(borders)]

    def take_piece(self, layer: int, positions: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Asks for a piece; returns its cells."""
        cells = np.unique(positions // np.uint32(self._source.bundles_per_cell))
        self._source.exchange(layer, cells, _NONE)
        return cells

    def give_back_piece(self, layer: int, cells: NDArray[np.uint32]) -> None:
        self._source.exchange(layer, _NONE, cells)

    def clear(self) -> None:
        """Holds nothing any more."""
        self._window.clear()
        self._source.idle()
