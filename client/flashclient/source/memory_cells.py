"""Cells that lie in this process's memory already: what is leased when a model is tried without a weightd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
from numpy.typing import NDArray

from flashclient._native import CellSource, CellWalk, LentMemory
from flashclient.daemon.channel import SessionLostError

CELLS_MAX = 2**16  # leased at once


class MemoryCells(CellSource):
    """See client/native/predict/cell_source.h. All cells arrive at once.

    Args:
        address_of: the address of a cell, by layer and number in the layer. That memory must be lent to the kernels.
    """

    def __init__(self, address_of: Callable[[int, int], int]) -> None:
        super().__init__()
        self._address_of = address_of
        self._layer = 0
        self._coming: list[int] = []

    def share_slots(self) -> int:
        return CELLS_MAX

    def lease_limit(self) -> int:
        return CELLS_MAX

    def exchange(self, layer: int, acquire: Sequence[int], release: Sequence[int]) -> None:
        self._layer = layer
        self._coming = list(acquire)

    def extend(self, acquire: Sequence[int], release: Sequence[int]) -> None:
        self._coming += acquire

    def arrived(self) -> list[tuple[int, int]]:
        arrived = [(cell, self._address_of(self._layer, cell)) for cell in self._coming]
        self._coming = []
        return arrived

    def cancel(self) -> None:
        self._coming = []


class MemoryTable:
    """A CellsSource of the rows of a table that lie in this process's memory.

    Args:
        rows: [rows, bytes] uint8.
        alike: there is one row, and all rows of the table are like it.
    """

    def __init__(self, rows: NDArray[np.uint8], alike: bool = False) -> None:
        self.errors = nullcontext()
        self._rows = rows
        self._lent = LentMemory(rows)
        self._step_bytes = 0 if alike else rows.shape[1]

    def open_walk(self) -> CellWalk:
        begin = int(self._rows.ctypes.data)
        return CellWalk(MemoryCells(lambda _, row: begin + row * self._step_bytes), 1, self._step_bytes)

    def idle(self) -> None:
        """No-op: nothing is leased."""

    def require_open(self) -> None:
        """No-op: there is no session."""

    def reattach(self, lost: SessionLostError) -> None:
        """Never needed: there is no session."""
        raise lost
