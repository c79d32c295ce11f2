"""RepeatedSource: a model of any size in little memory, which its weights share, to try it before there are any."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import nullcontext

import numpy as np
from numpy.typing import NDArray

from flashclient._native import CellWalk, LentMemory
from flashclient.source.bundle_source import Chunk, Counters
from flashclient.source.memory_cells import MemoryCells, MemoryTable
from weightd_proto import weightd_pb2
from weightd_proto.dram import LOOK_AHEAD_BYTES
from weightd_proto.encodings import bundles_in

CHUNK_BYTES = LOOK_AHEAD_BYTES // 2  # what a client over shared memory computes at once where nothing is missing
ALIGNMENT_BYTES = 64  # of kernels


def memory_bytes_min(record: weightd_pb2.Model) -> int:
    """Of the memory that a RepeatedSource takes: one cell, and the room to align it."""
    return record.bundle.stride_bytes * max(1, record.bundle.bundles_per_cell) + ALIGNMENT_BYTES


class RepeatedSource:
    """A BundleSource in exact mode. Its bundles lie one after the other in `memory`, and again from its beginning.

    Args:
        resident: the bytes of resident.safetensors.
        memory: of at least memory_bytes_min().
    """

    errors = nullcontext()

    def __init__(self, record: weightd_pb2.Model, resident: NDArray[np.uint8], memory: NDArray[np.uint8]) -> None:
        self.resident = resident
        self._layers = record.layers
        self._bundles = [bundles_in(record.bundle, layer) for layer in record.layers]
        self._stride_bytes = record.bundle.stride_bytes
        self._bundles_per_cell = max(1, record.bundle.bundles_per_cell)
        self._lent = LentMemory(memory)
        self._begin = -(-memory.ctypes.data // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        cell_bytes = self._bundles_per_cell * self._stride_bytes
        self._cells = (memory.ctypes.data + memory.nbytes - self._begin) // cell_bytes
        assert self._cells > 0
        self._next_bundle = 0
        self.tables = [
            MemoryTable(np.zeros((1, table.bundle.bundle_bytes), np.uint8), alike=True) for table in record.tables
        ]

    def placement(self, layer: int) -> NDArray[np.uint32]:
        """Bundles lie in the order of their neurons."""
        return np.arange(self._layers[layer].neurons, dtype=np.uint32)

    def chunks(self, layer: int) -> Generator[Chunk, None, None]:
        count, step = self._bundles[layer], max(1, CHUNK_BYTES // self._stride_bytes)
        for first in range(0, count, step):
            bundles = self._next_bundle + np.arange(min(step, count - first), dtype=np.uint64)
            self._next_bundle = int(bundles[-1]) + 1
            yield Chunk(first, self._begin + bundles % (self._cells * self._bundles_per_cell) * self._stride_bytes)

    def sweep(self) -> None:
        """None: the chunks are made in Python."""

    def open_walk(self) -> CellWalk:
        def address_of(layer: int, cell: int) -> int:
            number = sum(before.cells for before in self._layers[:layer]) + cell
            return self._begin + number % self._cells * self._bundles_per_cell * self._stride_bytes

        return CellWalk(MemoryCells(address_of), self._bundles_per_cell, self._stride_bytes)

    def require_open(self) -> None:
        """No-op: there is no session."""

    def idle(self) -> None:
        """No-op: no cells are leased."""

    def counters(self) -> Counters:
        return Counters()
