"""Bundles fetched one by one over gRPC into a bounded pool: what predict mode holds without shared memory.

A cell is one bundle here. Those that were given back stay in the pool until their slot is needed, the one given back
first gives way first. What an interrupted step (Ctrl-C) has left half done is not believed: the pool is empty then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from flashclient.daemon.channel import Connection
from flashclient.errors import RefusedError
from flashclient.source.border import Counters
from weightd_proto import weightd_pb2

Cell = tuple[int, int]  # layer, position


class RemoteCells:
    """The cells of a GrpcSource. See BundleSource for exchange(), arrived() and addresses().

    Args:
        pool: [bytes] uint8, in which the bundles come to lie.
    """

    def __init__(self, connection: Connection, model: weightd_pb2.Model, pool: NDArray[np.uint8]) -> None:
        self._connection = connection
        self._model = model
        self._bundle_bytes = model.bundle.bundle_bytes
        self._pool = pool[: len(pool) // self._bundle_bytes * self._bundle_bytes].reshape(-1, self._bundle_bytes)
        self.slots = len(self._pool)
        self._tables = [np.zeros(layer.neurons, np.uint64) for layer in model.layers]
        self._hits = self._misses = 0
        self._empty()

    def _empty(self) -> None:
        for table in self._tables:
            table[:] = 0
        self._slot_of: dict[Cell, int] = {}
        self._unused: OrderedDict[Cell, None] = OrderedDict()  # in the pool and not held, the first to go first
        self._free = list(range(self.slots))
        self._coming: list[Cell] = []  # in the order in which their bytes come
        self._bytes_come = 0  # of the first of them
        self._pieces: Iterator[bytes] = iter(())
        self.held = 0
        self._whole = True  # all of this agrees

    def addresses(self, layer: int) -> NDArray[np.uint64]:
        return self._tables[layer]

    def counters(self) -> Counters:
        return Counters(self._hits, self._misses, self._misses * self._bundle_bytes)

    def exchange(self, layer: int, acquire: NDArray[np.uint32], release: NDArray[np.uint32]) -> None:
        if not self._whole:
            self._empty()
        self._whole = False
        self._drop_coming()
        table = self._tables[layer]
        for position in release.tolist():
            if table[position]:
                self._give_back((layer, position))
        missing = []
        for position in acquire.tolist():
            if (layer, position) in self._slot_of:
                self._hold((layer, position))
                self._hits += 1
            else:
                missing.append((layer, position))
        self._take_slots(missing)
        self._misses += len(missing)
        if missing:
            self._coming = missing
            self._ask()
        self._whole = True

    def arrived(self) -> int:
        """Waits for the next message."""
        if self._coming:
            try:
                piece = next(self._pieces)
            except StopIteration:
                raise RefusedError(f"weightd sent too little: {len(self._coming)} bundles are missing") from None
            self._whole = False
            self._place(piece)
            self._whole = True
        return len(self._coming)

    def forget(self) -> None:
        """Holds nothing any more, and the pool is somebody else's to fill."""
        self._empty()

    def release_all(self) -> None:
        if not self._whole:
            self._empty()
            return
        self._whole = False
        self._drop_coming()
        for cell in [cell for cell in self._slot_of if cell not in self._unused]:
            self._give_back(cell)
        self._whole = True

    def _hold(self, cell: Cell) -> None:
        layer, position = cell
        self._unused.pop(cell, None)
        self.held += self._tables[layer][position] == 0
        self._tables[layer][position] = self._pool[self._slot_of[cell]].ctypes.data

    def _give_back(self, cell: Cell) -> None:
        self._tables[cell[0]][cell[1]] = 0
        self._unused[cell] = None
        self.held -= 1

    def _take_slots(self, cells: list[Cell]) -> None:
        assert len(cells) <= len(self._free) + len(self._unused), "more cells than lease_limit"
        for cell in cells:
            if not self._free:
                oldest, _ = self._unused.popitem(last=False)
                self._free.append(self._slot_of.pop(oldest))
            self._slot_of[cell] = self._free.pop()

    def _drop_coming(self) -> None:
        """After a step that ended early: what has not arrived is not waited for."""
        for cell in self._coming:
            self._free.append(self._slot_of.pop(cell))
        self._coming = []
        self._bytes_come = 0
        self._pieces = iter(())

    def _ask(self) -> None:
        layer = self._coming[0][0]
        positions = [weightd_pb2.Range(begin=position, end=position + 1) for _, position in self._coming]
        bundles = weightd_pb2.NeuronSet(layer=layer, positions=positions)
        request = weightd_pb2.FetchRequest(model=self._model.name, import_id=self._model.import_id, bundles=bundles)
        self._bytes_come = 0
        self._pieces = self._connection.fetch(request)

    def _place(self, data: bytes) -> None:
        piece = np.frombuffer(data, np.uint8)
        done = 0
        while len(piece):
            if done == len(self._coming):
                raise RefusedError("weightd sent more than the bundles asked for")
            slot = self._pool[self._slot_of[self._coming[done]]]
            taken = min(len(piece), self._bundle_bytes - self._bytes_come)
            slot[self._bytes_come : self._bytes_come + taken] = piece[:taken]
            piece, self._bytes_come = piece[taken:], self._bytes_come + taken
            if self._bytes_come == self._bundle_bytes:
                self._hold(self._coming[done])
                done, self._bytes_come = done + 1, 0
        self._coming = self._coming[done:]
