"""RepeatedSource: a model of any size in little memory, which its weights share, to try it before there are any."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import nullcontext

import numpy as np
from numpy.typing import NDArray

from flashclient._native import CellWalk, LentMemory, RepeatedCells, RepeatedChunks, RepeatedMemory
from flashclient.source.bundle_source import Chunk, Counters
from flashclient.source.memory_cells import MemoryTable
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
        self._stride_bytes = record.bundle.stride_bytes
        self._bundles_per_cell = max(1, record.bundle.bundles_per_cell)
        self._lent = LentMemory(memory)
        begin = -(-memory.ctypes.data // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        cells = (memory.ctypes.data + memory.nbytes - begin) // (self._bundles_per_cell * self._stride_bytes)
        assert cells > 0
        bundles = [bundles_in(record.bundle, layer) for layer in record.layers]
        self._memory = RepeatedMemory(begin, cells, self._bundles_per_cell, self._stride_bytes, bundles)
        self._chunks = RepeatedChunks(self._memory, max(1, CHUNK_BYTES // self._stride_bytes))
        self.tables = [
            MemoryTable(np.zeros((1, table.bundle.bundle_bytes), np.uint8), alike=True) for table in record.tables
        ]

    def placement(self, layer: int) -> NDArray[np.uint32]:
        """Bundles lie in the order of their neurons."""
        return np.arange(self._layers[layer].neurons, dtype=np.uint32)

    def chunks(self, layer: int) -> Generator[Chunk, None, None]:
        try:
            while (chunk := self._chunks.next(layer)) is not None:
                yield Chunk(*chunk)
        finally:
            self._chunks.leave()

    def sweep(self) -> RepeatedChunks:
        return self._chunks

    def open_walk(self) -> CellWalk:
        return CellWalk(RepeatedCells(self._memory), self._bundles_per_cell, self._stride_bytes)

    def require_open(self) -> None:
        """No-op: there is no session."""

    def idle(self) -> None:
        """No-op: no cells are leased."""

    def counters(self) -> Counters:
        return Counters()
