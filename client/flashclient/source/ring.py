"""RingSource: bundles in the daemon's own pool, over shared memory. No byte of a weight is copied."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from flashclient import _native
from flashclient.daemon.channel import Connection, SessionLostError
from flashclient.errors import CalibrationError, CorruptionError, DaemonLostError, FlashClientError, ForkedError
from flashclient.source.bundle_source import Chunk, Counters
from weightd_proto import weightd_pb2
from weightd_proto.dram import slots_wanted
from weightd_proto.encodings import bundle_neurons, bundles_in
from weightd_proto.tables import model_of, module_of

# A lookup borrows what it needs, for as long as it copies rows: a larger share would be kept from the FFNs.
TABLE_SLOTS = 2


class _RingErrors:
    """Turns exceptions of the native session into errors of flashclient.errors. Cheap: each layer enters it."""

    def __init__(self, model: str, neurons: int) -> None:
        self._model = model
        self._neurons = neurons  # of a bundle

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and (translated := self._translated(error)) is not None:
            raise translated from error

    def _translated(self, error: BaseException) -> Exception | None:
        match error:
            case _native.CorruptBundle() if module_of(self._model):
                where = f"model {model_of(self._model)}, table {module_of(self._model)}, row {error.position}"
                return CorruptionError(f"{where}: it {error.why}")
            case _native.CorruptBundle() if self._neurons > 1:
                first = error.position * self._neurons
                where = f"layer {error.layer}, slab {error.position} (neurons {first} to {first + self._neurons - 1})"
                return CorruptionError(f"{self._model}: {where} {error.why}")
            case _native.CorruptBundle():
                return CorruptionError(f"{self._model}: {error}")
            case _native.WrongProcess():
                return ForkedError(str(error))
            case _native.SessionLost() | FileNotFoundError() | ConnectionError():
                return SessionLostError(f"{self._model}: {error}")
            case _native.NoAnswer():
                return DaemonLostError(f"{self._model}: {error}")
            case OSError():
                return FlashClientError(f"{self._model}: {error}")
        return None


class RingSource:
    """See BundleSource. One session with the daemon; its share of the pool lasts until close() or a loss of weightd.

    Each table has a session more. Those open first: their shares are small, and that of the model takes up to half of
    what is left.

    Args:
        model: the record of a model or of a table.
        predicts: whether predictors() will be asked for. Otherwise their memory is left to the pool.

    Raises:
        ShareError: the pool has no room for another session.
        DaemonLostError: the daemon went away meanwhile.
    """

    def __init__(self, connection: Connection, model: weightd_pb2.Model, predicts: bool = True) -> None:
        self._connection = connection
        self._model = model
        self._name = model.name
        self._predicts = predicts
        self.errors = _RingErrors(model.name, bundle_neurons(model.bundle))
        bundle = model.bundle
        self.tables = [RingSource(connection, table, False) for table in model.tables]
        opened = self._open_session()
        with self.errors:
            self._session = _native.Session(opened.data_socket, opened.token, connection.timeout_s)
        bundles = [bundles_in(bundle, layer) for layer in model.layers]
        sizes = (bundle.bundles_per_cell, bundle.stride_bytes, bundle.cell_bytes)
        self._sweep: _native.Sweep | None = _native.Sweep(self._session, *sizes, bundles)
        self.leases = _native.Leases(self._session, self._sweep, bundle.bundles_per_cell, bundle.cell_bytes)
        self.window: _native.Window | None = None
        self.walk: _native.CellWalk | None = None

    @property
    def resident(self) -> NDArray[np.uint8]:
        return self._session.resident

    def predictors(self) -> NDArray[np.uint8]:
        data = self._session.calibration
        if len(data) == 0:
            raise CalibrationError(f"weightd gave no predictors of model '{self._name}': attach again")
        return data

    def sweep(self) -> _native.Sweep | None:
        sweep = self._open_sweep()
        if self.window is not None:
            with self.errors:
                self.window.clear()
        return sweep

    def chunks(self, layer: int) -> Generator[Chunk, None, None]:
        sweep = self.sweep()
        assert sweep is not None
        try:
            while True:
                with self.errors:
                    chunk = sweep.next(layer)
                if chunk is None:
                    return
                yield Chunk(*chunk)
        except GeneratorExit:
            sweep.leave()
            raise

    def open_window(self, tokens: int) -> _native.Window:
        bundle, cells = self._model.bundle, [layer.cells for layer in self._model.layers]
        self.window = _native.Window(self.leases, tokens, bundle.bundles_per_cell, bundle.stride_bytes, cells)
        return self.window

    def open_walk(self) -> _native.CellWalk:
        bundle = self._model.bundle
        # A table has a row for each token of the vocabulary, and keeps none of them from the FFNs.
        cells = None if module_of(self._name) else sum(layer.cells for layer in self._model.layers)
        self.walk = _native.CellWalk(self.leases, bundle.bundles_per_cell, bundle.stride_bytes, cells)
        return self.walk

    def idle(self) -> None:
        if self._sweep is None:
            return
        for table in self.tables:
            table.idle()
        try:
            with self.errors:
                self._sweep.idle()
                for held in (self.window, self.walk):
                    if held is not None:
                        held.clear()
        except SessionLostError:  # its leases are lost, too; the next request raises the error
            self._forget()

    def require_open(self) -> None:
        with self.errors:
            self._session.require_alive()

    def reattach(self, lost: SessionLostError) -> None:
        self._open_sweep()
        self._connection.attach_again(self._attach, lost)

    def _attach(self) -> None:
        for table in self.tables:
            table._attach()
        opened = self._open_session()
        self._forget()  # first: a signal handler may raise right after attach(), and idle() then asks the new session
        with self.errors:
            self._session.attach(opened.data_socket, opened.token)

    def _open_session(self) -> weightd_pb2.OpenSessionResponse:
        wanted = TABLE_SLOTS if module_of(self._name) else slots_wanted(self._model.bundle.cell_bytes)
        return self._connection.open_session(self._model, wanted, self._predicts)

    def _forget(self) -> None:
        self._open_sweep().forget()
        self.leases.forget()
        for held in (self.window, self.walk):
            if held is not None:
                held.forget()

    def counters(self) -> Counters:
        """The counters of this client's rings: a generation needs no call to weightd."""
        counters = Counters(*self._session.counters)
        for table in self.tables:
            counters = counters.plus(table.counters())
        return counters

    def close(self) -> None:
        """Gives everything back. The resident weights stay mapped as long as a tensor views them."""
        for table in self.tables:
            table.close()
        sweep, self._sweep = self._sweep, None
        self._session.close()  # first, because dropping the sweep would wait for its cells
        del sweep

    def _open_sweep(self) -> _native.Sweep:
        if self._sweep is None:
            raise DaemonLostError(f"{self._name}: the client was closed during a generation")
        return self._sweep
