"""RingSource: bundles in the daemon's own pool, over shared memory. No byte of a weight is copied."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from flashclient import _native
from flashclient.channel import Connection
from flashclient.errors import CorruptionError, DaemonLostError, FlashClientError, ForkedError
from flashclient.source import Chunk, Counters
from weightd_proto import weightd_pb2

# What is leased ahead cannot be what the pool keeps, and 8 MiB in flight are enough for a device's full speed.
LOOK_AHEAD_BYTES = 8 * 2**20


@contextmanager
def _ring_errors(model: str) -> Iterator[None]:
    try:
        yield
    except _native.CorruptBundle as error:
        raise CorruptionError(f"{model}: {error}") from error
    except _native.WrongProcess as error:
        raise ForkedError(str(error)) from error
    except (_native.SessionLost, FileNotFoundError, ConnectionError) as error:
        raise DaemonLostError(f"{model}: {error}") from error
    except OSError as error:
        raise FlashClientError(f"{model}: {error}") from error


class RingSource:
    """See BundleSource. One session with the daemon: its share of the pool lasts until close().

    Raises:
        ShareError: the pool has no room for another session.
        DaemonLostError: the daemon went away in between.
    """

    def __init__(self, connection: Connection, model: weightd_pb2.Model) -> None:
        self._connection = connection
        self._name = model.name
        bundle = model.bundle
        opened = connection.open_session(model.name, max(4, LOOK_AHEAD_BYTES // bundle.cell_bytes))
        with _ring_errors(model.name):
            self._session = _native.Session(opened.data_socket, opened.token, connection.timeout_s)
        self.share_slots: int = opened.share_slots
        neurons = [layer.neurons for layer in model.layers]
        self._sweep: _native.Sweep | None = _native.Sweep(
            self._session, bundle.bundles_per_cell, bundle.stride_bytes, bundle.cell_bytes, neurons
        )

    @property
    def resident(self) -> NDArray[np.uint8]:
        return self._session.resident

    def chunks(self, layer: int) -> Generator[Chunk, None, None]:
        sweep = self._open_sweep()
        while True:
            with _ring_errors(self._name):
                chunk = sweep.next(layer)
            if chunk is None:
                return
            yield Chunk(*chunk)

    def idle(self) -> None:
        if self._sweep is not None:
            with _ring_errors(self._name):
                self._sweep.idle()

    def counters(self) -> Counters:
        """Of the model in the daemon, so of all its sessions together."""
        for model in self._connection.stats().models:
            if model.name == self._name:
                return Counters(model.hits, model.misses, model.read_bytes)
        return Counters()

    def close(self) -> None:
        """Gives everything back. The resident weights stay mapped as long as a tensor views them."""
        if self._sweep is not None:
            self._sweep = None
            self._session.close()

    def _open_sweep(self) -> _native.Sweep:
        if self._sweep is None:
            raise DaemonLostError(f"{self._name}: the client was closed during a generation")
        return self._sweep
