"""Cells fetched one by one over gRPC into a bounded pool: what is leased without shared memory.

A cell is one bundle for predict mode, and a cell of the store for a model with experts. Cells that were given back stay
in the pool until their slot is needed, and are replaced in the order in which they were given back. An interrupted call
(Ctrl-C) leaves the pool in an unknown state, so the next call empties it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashclient._native import CellSource
from flashclient.daemon.channel import Connection
from flashclient.errors import RefusedError
from flashclient.source.bundle_source import Counters
from weightd_proto import weightd_pb2
from weightd_proto.encodings import bundles_in

Cell = tuple[int, int]  # layer, number in the layer


@dataclass
class Coming:
    """Cells that one call fetches.

    Attributes:
        cells: those that have not arrived, in the order in which their bytes come.
        bytes_come: of the first of them.
    """

    cells: deque[Cell]
    pieces: Iterator[bytes]
    bytes_come: int = 0


class RemoteCells(CellSource):
    """The CellSource of a GrpcSource (client/native/predict/cell_source.h), whose pool holds `slots` cells.

    Args:
        pool: [bytes] uint8, the memory for the bundles.
        bundles_per_cell: the bundles of a cell lie back to back.
        claim: empties the pool of chunks; called before each exchange.
    """

    def __init__(
        self,
        connection: Connection,
        model: weightd_pb2.Model,
        pool: NDArray[np.uint8],
        bundles_per_cell: int,
        claim: Callable[[], None],
    ) -> None:
        super().__init__()
        self._connection = connection
        self._model = model
        self._claim = claim
        self._bundle_bytes = model.bundle.bundle_bytes
        self._bundles_per_cell = bundles_per_cell
        cell_bytes = bundles_per_cell * self._bundle_bytes
        self._pool = pool[: len(pool) // cell_bytes * cell_bytes].reshape(-1, cell_bytes)
        self.slots = len(self._pool)
        self._bundles = [bundles_in(model.bundle, layer) for layer in model.layers]
        self._hits = self._misses = self._read_bytes = 0
        self._layer = 0  # of the last exchange
        self._empty()

    def _empty(self) -> None:
        self._slot_of: dict[Cell, int] = {}
        self._unused: OrderedDict[Cell, None] = OrderedDict()  # in the pool and not leased; the first is replaced first
        self._free = list(range(self.slots))
        self._coming: deque[Coming] = deque()
        self._arrived: list[Cell] = []  # not yet returned by arrived()
        self._whole = True  # the attributes above are consistent

    def share_slots(self) -> int:
        return self.slots

    def lease_limit(self) -> int:
        return self.slots

    def counters(self) -> Counters:
        return Counters(self._hits, self._misses, self._read_bytes)

    def exchange(self, layer: int, acquire: Sequence[int], release: Sequence[int]) -> None:
        self._claim()
        if not self._whole:
            self._empty()
        self._whole = False
        self._drop_coming()
        self._layer = layer
        self._send(acquire, release)
        self._whole = True

    def extend(self, acquire: Sequence[int], release: Sequence[int]) -> None:
        self._whole = False
        self._send(acquire, release)
        self._whole = True

    def _send(self, acquire: Sequence[int], release: Sequence[int]) -> None:
        for number in release:
            if (self._layer, number) in self._slot_of:
                self._unused[self._layer, number] = None
        missing = []
        for number in acquire:
            cell = (self._layer, number)
            if cell in self._slot_of:
                self._unused.pop(cell, None)
                self._arrived.append(cell)
                self._hits += 1
            else:
                missing.append(cell)
        self._take_slots(missing)
        self._misses += len(missing)
        if missing:
            self._coming.append(Coming(deque(missing), self._fetch(missing)))

    def arrived(self) -> list[tuple[int, int]]:
        """The cells that have arrived since the last call. Waits for a message if there are none."""
        while self._coming and not self._arrived:
            coming = self._coming[0]
            try:
                piece = next(coming.pieces)
            except StopIteration:
                raise RefusedError(f"weightd sent too little: {len(coming.cells)} cells are missing") from None
            self._whole = False
            self._place(piece, coming)
            if not coming.cells:
                self._coming.popleft()
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
        for coming in self._coming:
            self._free += [self._slot_of.pop(cell) for cell in coming.cells]
        self._coming.clear()

    def _take_slots(self, cells: list[Cell]) -> None:
        assert len(cells) <= len(self._free) + len(self._unused), "more cells than lease_limit"
        for cell in cells:
            if not self._free:
                oldest, _ = self._unused.popitem(last=False)
                self._free.append(self._slot_of.pop(oldest))
            self._slot_of[cell] = self._free.pop()

    def _positions(self, cell: Cell) -> tuple[int, int]:
        """The first position of the cell, and the one after its last."""
        begin = cell[1] * self._bundles_per_cell
        return begin, min(begin + self._bundles_per_cell, self._bundles[cell[0]])

    def _fetch(self, cells: list[Cell]) -> Iterator[bytes]:
        bounds = [self._positions(cell) for cell in cells]
        positions = [weightd_pb2.Range(begin=begin, end=end) for begin, end in bounds]
        bundles = weightd_pb2.NeuronSet(layer=self._layer, positions=positions)
        self._read_bytes += sum(end - begin for begin, end in bounds) * self._bundle_bytes
        request = weightd_pb2.FetchRequest(model=self._model.name, import_id=self._model.import_id, bundles=bundles)
        return self._connection.fetch(request)

    def _place(self, data: bytes, coming: Coming) -> None:
        piece = np.frombuffer(data, np.uint8)
        while len(piece):
            if not coming.cells:
                raise RefusedError("weightd sent more than the bundles asked for")
            cell = coming.cells[0]
            begin, end = self._positions(cell)
            slot = self._pool[self._slot_of[cell], : (end - begin) * self._bundle_bytes]
            taken = min(len(piece), len(slot) - coming.bytes_come)
            slot[coming.bytes_come : coming.bytes_come + taken] = piece[:taken]
            piece, coming.bytes_come = piece[taken:], coming.bytes_come + taken
            if coming.bytes_come == len(slot):
                self._arrived.append(coming.cells.popleft())
                coming.bytes_come = 0
