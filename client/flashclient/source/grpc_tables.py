"""Rows of a table over gRPC, into a small pool of this process: words that are repeated are fetched once."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np

from flashclient._native import CellWalk, LentMemory
from flashclient.daemon.channel import Connection, SessionLostError
from flashclient.errors import DaemonLostError
from flashclient.source.bundle_source import Counters
from flashclient.source.grpc_cells import RemoteCells
from weightd_proto import weightd_pb2

POOL_BYTES = 8 << 20
ROWS_MAX = 4096  # a call may name 16384 ranges of rows


class GrpcTable:
    """See CellsSource. A row is leased as a cell of its own."""

    def __init__(self, connection: Connection, table: weightd_pb2.Model) -> None:
        self._connection = connection
        self._row_bytes = table.bundle.bundle_bytes
        rows = min(table.layers[0].neurons, max(2, min(ROWS_MAX, POOL_BYTES // self._row_bytes)))
        pool = np.empty(rows * self._row_bytes, np.uint8)
        self.errors = nullcontext()  # the native code calls this process, which raises errors of flashclient itself
        self._lent = LentMemory(pool)
        self._cells = RemoteCells(connection, table, pool, 1, self._require_not_closed)
        self._walk: CellWalk | None = None
        self._closed = False

    def open_walk(self) -> CellWalk:
        self._walk = CellWalk(self._cells, 1, self._row_bytes)
        return self._walk

    def idle(self) -> None:
        if self._walk is not None:
            self._walk.clear()

    def require_open(self) -> None:
        """The pool belongs to this process: nothing in it changes."""

    def reattach(self, lost: SessionLostError) -> None:
        self._require_not_closed()
        self._connection.attach_again(lambda: None, lost)

    def _require_not_closed(self) -> None:
        if self._closed:
            raise DaemonLostError("the client was closed during a generation")

    def counters(self) -> Counters:
        return self._cells.counters()

    def close(self) -> None:
        self._closed = True
        self._walk = None  # a reference cycle, through native objects that the garbage collector cannot see
