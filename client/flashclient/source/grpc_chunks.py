"""GrpcSource: bundles over gRPC into a bounded pool of this process, for a daemon on another machine.

For exact mode the model is cut into chunks of neighbouring positions, numbered through all layers. A consumer walks
through them again and again. Two threads fetch those of the next few chunks that are missing. The chunk that is evicted
is the one needed last, which is the one used most recently (Belady's choice). So a fixed part of the model stays in the
pool, beside the few chunks ahead. Least-recently-used would miss every chunk of a walk longer than the pool.

Predict mode and models with experts use the same memory for cells (grpc_cells.py). The pool is emptied when the mode
changes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashclient._native import CellWalk, LentMemory, Window
from flashclient.daemon.channel import Connection, SessionLostError
from flashclient.errors import DaemonLostError, FlashClientError, OptionError, RefusedError
from flashclient.source.bundle_source import Chunk, Counters
from flashclient.source.grpc_cells import RemoteCells
from flashclient.source.grpc_tables import GrpcTable
from weightd_proto import weightd_pb2
from weightd_proto.encodings import bundles_in, has_experts
from weightd_proto.files import ALIGNMENT_BYTES, PREDICTORS_FILE

CHUNK_BYTES = 2**20  # one response; large enough that a round trip of half a millisecond is small beside it
CHUNKS_AHEAD = 4
LOADERS = 2  # one fetch is on the wire while the other's bytes are copied
POOL_BYTES_DEFAULT = 256 * 2**20


@dataclass(frozen=True)
class Span:
    """The positions [begin, end) of a layer: what one chunk holds."""

    layer: int
    begin: int
    end: int

    @property
    def bundles(self) -> int:
        return self.end - self.begin


def ffn_bytes(model: weightd_pb2.Model) -> int:
    """The bytes of all bundles without padding."""
    return model.bundle.bundle_bytes * sum(bundles_in(model.bundle, layer) for layer in model.layers)


def chunk_bundles_for(model: weightd_pb2.Model, pool_bytes: int) -> int:
    """The number of bundles in a chunk. Chunks are equal parts of a layer, of at most CHUNK_BYTES and half of the pool.

    Raises OptionError if the pool is too small.
    """
    bundle_bytes = model.bundle.bundle_bytes
    if pool_bytes < 2 * bundle_bytes:
        raise OptionError(f"pool_bytes={pool_bytes} is too small: two bundles of this model take {2 * bundle_bytes}")
    most = max(1, min(CHUNK_BYTES, pool_bytes // 2) // bundle_bytes)
    bundles = max(bundles_in(model.bundle, layer) for layer in model.layers)
    return math.ceil(bundles / math.ceil(bundles / most))


def bundles_per_cell_for(model: weightd_pb2.Model, pool_bytes: int) -> int:
    """Bundles that are fetched and leased together. Raises OptionError where the pool does not hold two cells."""
    if not has_experts(model):
        return 1
    bundles = model.bundle.bundles_per_cell
    cells_bytes = 2 * bundles * model.bundle.bundle_bytes
    if pool_bytes < cells_bytes:
        raise OptionError(f"pool_bytes={pool_bytes} is too small: two cells of this model need {cells_bytes}")
    return bundles


def cut_spans(model: weightd_pb2.Model, chunk_bundles: int) -> list[Span]:
    return [
        Span(index, begin, min(begin + chunk_bundles, bundles_in(model.bundle, layer)))
        for index, layer in enumerate(model.layers)
        for begin in range(0, bundles_in(model.bundle, layer), chunk_bundles)
    ]


class GrpcSource:
    """See BundleSource. The pool and the resident weights are private memory of this process.

    Args:
        pool_bytes: the size of the local pool; None means what the FFNs need, at most 256 MiB. At least two chunks.
    """

    def __init__(self, connection: Connection, model: weightd_pb2.Model, *, pool_bytes: int | None = None) -> None:
        self._connection = connection
        self._model = model
        pool_bytes = pool_bytes or min(POOL_BYTES_DEFAULT, ffn_bytes(model))
        chunk_bundles = chunk_bundles_for(model, pool_bytes)
        self._spans = cut_spans(model, chunk_bundles)
        self._spans_of_layer = [
            [i for i, span in enumerate(self._spans) if span.layer == layer] for layer in range(len(model.layers))
        ]
        chunk_bytes = chunk_bundles * model.bundle.bundle_bytes
        slots = min(len(self._spans), max(2, pool_bytes // chunk_bytes))
        self._pool = np.empty((slots, chunk_bytes), np.uint8)
        self._lent = LentMemory(self._pool)  # kernels may read bundles there
        self._ahead = min(CHUNKS_AHEAD, slots - 1)
        self._bundles_per_cell = bundles_per_cell_for(model, self._pool.size)
        self.cells = RemoteCells(
            connection, model, self._pool.reshape(-1), self._bundles_per_cell, self._claim_for_cells
        )
        self._holds_cells = False  # the pool has cells in it, not chunks
        self.window: Window | None = None
        self.walk: CellWalk | None = None
        self.tables = [GrpcTable(connection, table) for table in model.tables]
        self._resident = self._fetch_resident()
        self._closed = threading.Event()
        self._lock = threading.Lock()  # guards everything below
        self._wanted = threading.Condition(self._lock)  # the loaders wait for it
        self._news = threading.Lock()  # the thread that generates waits for it; locked when nothing is new
        self._free = list(range(slots))
        self._slot_of: dict[int, int] = {}  # span -> slot, from the moment its fetch begins
        self._ready: set[int] = set()  # spans whose bytes have arrived
        self._cursor: int | None = None  # the span in use or wanted next; None when idle
        self._walk = 0  # counts the ends of walks
        self._failed: dict[int, FlashClientError] = {}  # spans that could not be fetched in this walk
        self._served_bundles = 0
        self._fetched_bundles = 0
        self._loaders = [
            threading.Thread(target=self._load, name=f"flashclient-fetch-{i}", daemon=True) for i in range(LOADERS)
        ]
        for loader in self._loaders:
            loader.start()

    @property
    def errors(self) -> AbstractContextManager[None]:
        return nullcontext()  # the native code calls this class, which raises errors of flashclient itself

    @property
    def resident(self) -> NDArray[np.uint8]:
        return self._resident

    def predictors(self) -> NDArray[np.uint8]:
        version, files = self._model.calibration.version, self._model.calibration.files
        (size,) = [file.size_bytes for file in files if file.name == PREDICTORS_FILE]
        padded = np.empty(size + ALIGNMENT_BYTES, np.uint8)
        begin = -padded.ctypes.data % ALIGNMENT_BYTES
        data = padded[begin : begin + size]
        wanted = weightd_pb2.CalibrationFile(version=version, name=PREDICTORS_FILE)
        self._fetch_whole(data, calibration=wanted)
        return data

    def open_window(self, tokens: int) -> Window:
        neurons = [layer.neurons for layer in self._model.layers]
        self.window = Window(self.cells, tokens, 1, self._model.bundle.bundle_bytes, neurons)
        return self.window

    def open_walk(self) -> CellWalk:
        self.walk = CellWalk(self.cells, self._bundles_per_cell, self._model.bundle.bundle_bytes)
        return self.walk

    def _claim_for_cells(self) -> None:
        """Waits for fetches under way, then removes the chunks from the pool."""
        if self._closed.is_set():
            raise DaemonLostError("the client was closed during a generation")
        if self._holds_cells:
            return
        self._quiet()
        with self._lock:
            self._free += self._slot_of.values()
            self._slot_of.clear()
            self._ready.clear()
        self._holds_cells = True

    def _claim_for_chunks(self) -> None:
        if self._holds_cells:
            for held in (self.window, self.walk):
                if held is not None:
                    held.forget()
            self.cells.forget()
            self._holds_cells = False

    def sweep(self) -> None:
        """None: the chunks are made in Python."""

    def chunks(self, layer: int) -> Generator[Chunk, None, None]:
        self._claim_for_chunks()
        for index in self._spans_of_layer[layer]:
            slot = self._wait_for(index)
            try:
                yield self._chunk(self._spans[index], slot)
            finally:
                self._move_on(index)

    def idle(self) -> None:
        with self._lock:
            self._end_walk()
        for held in (self.window, self.walk):
            if held is not None:
                held.clear()
        for table in self.tables:
            table.idle()

    def require_open(self) -> None:
        """The pool belongs to this process: nothing in it changes."""

    def reattach(self, lost: SessionLostError) -> None:
        if self._closed.is_set():
            raise DaemonLostError("the client was closed during a generation") from lost
        self._connection.attach_again(self._quiet, lost)

    def _quiet(self) -> None:
        """Waits for fetches under way. Afterwards nothing writes to the pool."""
        with self._lock:
            self._end_walk()
        self._await(lambda: len(self._ready) == len(self._slot_of))

    def _end_walk(self) -> None:
        """Fetches under way may still arrive. Their errors do not concern the walks that begin afterwards."""
        self._cursor = None
        self._walk += 1
        self._failed.clear()

    def counters(self) -> Counters:
        with self._lock:
            hits = max(0, self._served_bundles - self._fetched_bundles)
            read_bytes = self._fetched_bundles * self._model.bundle.bundle_bytes
            counters = Counters(hits, self._fetched_bundles, read_bytes).plus(self.cells.counters())
        for table in self.tables:
            counters = counters.plus(table.counters())
        return counters

    def close(self) -> None:
        """Ends the fetching threads. Waits for a fetch on the wire unless the connection was closed before."""
        self._closed.set()
        for table in self.tables:
            table.close()
        with self._lock:
            self._tell()
        for loader in self._loaders:
            loader.join()
        # They close a reference cycle, through native objects that the garbage collector cannot see.
        self.window = self.walk = None

    def _wait_for(self, index: int) -> int:
        """Makes `index` the cursor and returns its slot once its bytes have arrived."""
        with self._lock:
            self._cursor = index
            self._wanted.notify_all()
        self._await(lambda: index in self._ready or index in self._failed or self._closed.is_set())
        with self._lock:
            if index in self._failed:
                error = self._failed[index]
                self._end_walk()
                raise error
            if index not in self._ready:
                raise DaemonLostError("the client was closed during a generation")
            self._served_bundles += self._spans[index].bundles
            return self._slot_of[index]

    def _await(self, ready: Callable[[], bool]) -> None:
        """Waits until ready(), which is called under the lock.

        An interrupt while the main thread waits for a Condition could leave its lock in the wrong state; that of a
        Lock cannot.
        """
        while True:
            self._news.acquire(blocking=False)
            with self._lock:
                if ready():
                    return
            self._news.acquire()

    def _tell(self) -> None:
        """Wakes all that wait for what changed under the lock."""
        self._wanted.notify_all()
        if self._news.locked():
            self._news.release()

    def _move_on(self, index: int) -> None:
        with self._lock:
            if self._cursor == index:
                self._cursor = (index + 1) % len(self._spans)
                self._wanted.notify_all()

    def _chunk(self, span: Span, slot: int) -> Chunk:
        bundle_bytes = self._model.bundle.bundle_bytes
        offsets = np.arange(span.bundles, dtype=np.uint64) * np.uint64(bundle_bytes)
        return Chunk(span.begin, offsets + np.uint64(self._pool[slot].ctypes.data))

    def _distance(self, index: int) -> int:
        """The number of spans before `index` is needed; 0 for the span at the cursor."""
        assert self._cursor is not None
        return (index - self._cursor) % len(self._spans)

    def _next_missing(self) -> int | None:
        """The nearest span ahead that has no slot; None if there is none, or if no slot can be found for it."""
        if self._cursor is None:
            return None
        for distance in range(self._ahead + 1):
            index = (self._cursor + distance) % len(self._spans)
            if index not in self._slot_of and index not in self._failed:
                victim = self._victim()
                return index if self._free or (victim is not None and self._distance(victim) > distance) else None
        return None

    def _victim(self) -> int | None:
        return max(self._ready, key=self._distance, default=None)

    def _claim(self) -> tuple[int, int, int] | None:
        """Waits for a span to fetch. Returns it, the slot to fill and the walk that wants it; None after close()."""
        with self._lock:
            self._wanted.wait_for(lambda: self._closed.is_set() or self._next_missing() is not None)
            index = self._next_missing()
            if self._closed.is_set() or index is None:
                return None
            if not self._free:
                victim = self._victim()
                assert victim is not None
                self._ready.remove(victim)
                self._free.append(self._slot_of.pop(victim))
            self._slot_of[index] = self._free.pop()
            return index, self._slot_of[index], self._walk

    def _load(self) -> None:
        while (claim := self._claim()) is not None:
            index, slot, walk = claim
            try:
                self._fill(self._spans[index], slot)
            except FlashClientError as error:
                self._give_up(index, error, walk)
            else:
                with self._lock:
                    self._ready.add(index)
                    self._fetched_bundles += self._spans[index].bundles
                    self._tell()

    def _give_up(self, index: int, error: FlashClientError, walk: int) -> None:
        with self._lock:
            self._free.append(self._slot_of.pop(index))
            if walk == self._walk:
                self._failed[index] = error
            self._tell()

    def _fill(self, span: Span, slot: int) -> None:
        positions = [weightd_pb2.Range(begin=span.begin, end=span.end)]
        bundles = weightd_pb2.NeuronSet(layer=span.layer, positions=positions)
        target = self._pool[slot, : span.bundles * self._model.bundle.bundle_bytes]
        self._receive(target, self._connection.timeout_s, bundles=bundles)

    def _fetch_resident(self) -> NDArray[np.uint8]:
        size = self._model.resident_file_bytes
        resident = np.empty(size, np.uint8)
        self._fetch_whole(resident, resident=weightd_pb2.ByteRange(offset=0, size=size))
        return resident

    def _fetch_whole(self, target: NDArray[np.uint8], **what: Any) -> None:
        # A gigabyte takes seconds, so the time allowed grows with the size, as on a link of 10 MB/s.
        self._receive(target, self._connection.timeout_s + target.size / 10e6, **what)

    def _receive(self, target: NDArray[np.uint8], timeout_s: float, **what: Any) -> None:
        """Fills `target` with the answer to a Fetch of `what`. Raises RefusedError unless the sizes agree."""
        request = weightd_pb2.FetchRequest(model=self._model.name, import_id=self._model.import_id, **what)
        received = 0
        for data in self._connection.fetch(request, timeout_s):
            if received + len(data) > target.size:
                raise RefusedError(f"weightd sent more than the {target.size} bytes asked for")
            target[received : received + len(data)] = np.frombuffer(data, np.uint8)
            received += len(data)
        if received != target.size:
            raise RefusedError(f"weightd sent {received} of {target.size} bytes asked for")
