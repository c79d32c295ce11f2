"""Bundles fetched one by one over gRPC into a bounded pool: what predict mode leases without shared memory.

A cell is one bundle here. Cells that were given back stay in the pool until their slot is needed, and are replaced in
the order in which they were given back. An interrupted call (Ctrl-C) leaves the pool in an unknown state, so the next
call empties it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from flashclient._native import CellSource
from flashclient.daemon.channel import Connection
from flashclient.errors import RefusedError
from flashclient.source.bundle_source import Counters
from weightd_proto import weightd_pb2

Cell = tuple[int, int]  # layer, position


class RemoteCells(CellSource):
    """The CellSource of a GrpcSource (client/native/predict/cell_source.h), whose pool holds `slots` cells.

    Args:
        pool: [bytes] uint8, the memory for the bundles.
        claim: empties the pool of chunks; called before each exchange.
    """

    def __init__(
        self,
        connection: Connection,
        model: weightd_pb2.Model,
        pool: NDArray[np.uint8],
        claim: Callable[[], None],
    ) -> None:
        super().__init__()
        self._connection = connection
        self._model = model
        self._claim = claim
        self._bundle_bytes = model.bundle.bundle_bytes
        self._pool = pool[: len(pool) // self._bundle_bytes * self._bundle_bytes].reshape(-1, self._bundle_bytes)
        self.slots = len(self._pool)
        self._hits = self._misses = 0
        self._empty()

    def _empty(self) -> None:
        self._slot_of: dict[Cell, int] = {}
        self._unused: OrderedDict[Cell, None] = OrderedDict()  # in the pool and not leased; the first is replaced first
        self._free = list(range(self.slots))
        self._coming: list[Cell] = []  # in the order in which their bytes come
        self._bytes_come = 0  # bytes that have come, of the first of these cells
        self._pieces: Iterator[bytes] = iter(())
        self._arrived: list[Cell] = []  # not yet returned by arrived()
        self._whole = True  # the attributes above are consistent

    def share_slots(self) -> int:
        return self.slots

    def lease_limit(self) -> int:
        return self.slots

    def counters(self) -> Counters:
        return Counters(self._hits, self._misses, self._misses * self._bundle_bytes)

    def exchange(self, layer: int, acquire: Sequence[int], release: Sequence[int]) -> None:
        self._claim()
        if not self._whole:
            self._empty()
        self._whole = False
        self._drop_coming()
        for position in release:
            if (layer, position) in self._slot_of:
                self._unused[layer, position] = None
        missing = []
        for position in acquire:
            cell = (layer, position)
            if cell in self._slot_of:
                self._unused.pop(cell, None)
                self._arrived.append(cell)
                self._hits += 1
            else:
                missing.append(cell)
        self._take_slots(missing)
        self._misses += len(missing)
        if missing:
            self._coming = missing
            self._ask()
        self._whole = True

    def arrived(self) -> list[tuple[int, int]]:
        """The cells that have arrived since the last call. Waits for a message if there are none."""
        while self._coming and not self._arrived:
            try:
                piece = next(self._pieces)
            except StopIteration:
                raise RefusedError(f"weightd sent too little: {len(self._coming)} bundles are missing") from None
            self._whole = False
            self._place(piece)
            self._whole = True
        arrived, self._arrived = self._arrived, []
        return [(cell[1], self._pool[self._slot_of[cell]].ctypes.data) for cell in arrived]

    def forget(self) -> None:
        """Drops all leases and all cells. The pool can be used for something else."""
        self._empty()

    def cancel(self) -> None:
        """Ends all leases after a step that ended early.

        The window gives back only the cells that it knows of. An interrupted window may not know all cells that
        arrived() has returned.
        """
        if not self._whole:
            self._empty()
        self._whole = False
        self._drop_coming()
        for cell in self._slot_of:
            self._unused.setdefault(cell)
        self._arrived = []
        self._whole = True

    def _drop_coming(self) -> None:
        for cell in self._coming:
            self._free.append(self._slot_of.pop(cell))
        self._coming = []
        self._bytes_come = 0
        self._pieces = iter(())

    def _take_slots(self, cells: list[Cell]) -> None:
        assert len(cells) <= len(self._free) + len(self._unused), "more cells than lease_limit"
        for cell in cells:
            if not self._free:
                oldest, _ = self._unused.popitem(last=False)
                self._free.append(self._slot_of.pop(oldest))
            self._slot_of[cell] = self._free.pop()

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
                self._arrived.append(self._coming[done])
                done, self._bytes_come = done + 1, 0
        self._coming = self._coming[done:]
