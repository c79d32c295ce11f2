"""The cost of the shared-memory path per token, against the same generation with an engine in the same process.

Both clients run in one process with the same resident weights, kernels and threads, and with pools of the same size.
One leases its cells from weightd over the ring. The other calls an engine in its own thread
(scripts/benchmarks/native/in_process_engine.h). They decode the same tokens in turn (ABBA) and must get the same
logits.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from pathlib import Path
from statistics import median

import flashclient  # before torch, so that torch's idle threads do not spin

# isort: split
import numpy as np
from paper.rows import COLD
from planted.store import PlantedStore, planted_store

from benchmarks.native_module import bench_native
from benchmarks.processes import BenchError, serving
from benchmarks.report import Row, abba
from benchmarks.sharing_client import Task, decode
from flashclient._native import Window
from flashclient.daemon.channel import Connection, SessionLostError
from flashclient.source.bundle_source import BundleSource, Chunk
from flashclient.source.ring import RingSource
from weightd.serving.served_models import demand_of, model_spec
from weightd.store.store import Store
from weightd_proto import weightd_pb2

CHUNK_BYTES = 4 << 20  # as the sweep over the ring gives out when all is in the pool
SLOTS_WANTED_BYTES = 8 << 20
IO_THREADS, IO_DEPTH = 32, 64
ROUNDS = 8  # of four generations; the ratio of a single round varies from 0.95 to 1.1
SEED = 11
PROMPT_TOKENS = 16
KINDS = [("predict", 1.0, 64), ("exact", 1.0, 16), ("predict", 0.5, 64)]  # mode, share of the FFN in the pool, tokens


class EngineSource(RingSource):
    """A BundleSource whose cells come from an engine in this process; only resident weights and predictors are the
    daemon's."""

    def __init__(self, connection: Connection, model: weightd_pb2.Model, store: Store, dram_bytes: int) -> None:
        super().__init__(connection, model)
        self._record = model
        self._engine = bench_native().InProcessEngine(
            dram_bytes,
            model_spec(store, model),
            io_engine="auto",
            io_threads=IO_THREADS,
            io_depth=IO_DEPTH,
            slots_wanted=SLOTS_WANTED_BYTES // model.bundle.cell_bytes,
        )

    def chunks(self, layer: int) -> Generator[Chunk, None, None]:
        facts, bundle = self._record.layers[layer], self._record.bundle
        if self.window is not None:
            self.window.clear()
        count = CHUNK_BYTES // bundle.cell_bytes
        within = np.arange(bundle.bundles_per_cell, dtype=np.uint64) * np.uint64(bundle.stride_bytes)
        for first in range(0, facts.cells, count):
            cells = min(count, facts.cells - first)
            starts = self._engine.lease_range(layer, first, cells)
            position = first * bundle.bundles_per_cell
            try:
                yield Chunk(position, (starts[:, None] + within).reshape(-1)[: facts.neurons - position])
            finally:
                self._engine.release_range(layer, first, cells)

    def sweep(self) -> None:
        """None: the chunks are made in Python."""

    def open_window(self, tokens: int) -> Window:
        bundle, cells = self._record.bundle, [layer.cells for layer in self._record.layers]
        self.window = Window(self._engine, tokens, bundle.bundles_per_cell, bundle.stride_bytes, cells)
        return self.window

    def idle(self) -> None:
        if self.window is not None:
            self.window.clear()

    def require_open(self) -> None: ...

    def reattach(self, lost: SessionLostError) -> None:
        raise lost


class InProcessClient(flashclient.FlashClient):
    """A FlashClient that computes on an engine of its own."""

    def __init__(self, planted: PlantedStore, dram_bytes: int, address: str, mode: str) -> None:
        self._planted = planted
        self._dram_bytes = dram_bytes
        super().__init__(planted.name, address=address, mode=mode)

    def _open_source(
        self, connection: Connection, record: weightd_pb2.Model, address: str, predicts: bool
    ) -> BundleSource:
        store = Store.open(self._planted.store, readonly=True)
        return EngineSource(connection, record, store, self._dram_bytes)


def token_ms(client: flashclient.FlashClient, task: Task, digests: set[str]) -> float:
    """The median time of a token, without the prompt."""
    told = decode(client, task)
    digests.add(told["digest"])
    return 1e3 * float(median(told["seconds"][1:]))


def compared(planted: PlantedStore, mode: str, pool_share: float, tokens: int) -> Row:
    """One row: both paths in turn. Raises BenchError when their logits differ."""
    record = planted.record
    dram_bytes = demand_of(record).minimum_bytes + int(pool_share * record.bundles_file_bytes)
    task = Task("", planted.name, mode, PROMPT_TOKENS, tokens, SEED)
    digests: set[str] = set()
    with (
        serving(planted.store, dram_bytes, COLD) as daemon,
        flashclient.FlashClient(planted.name, address=daemon.address, mode=mode) as over_ring,
        InProcessClient(planted, dram_bytes, daemon.address, mode) as in_process,
    ):
        for client in (over_ring, in_process):  # fills the pools
            token_ms(client, task, digests)
        shared_ms, own_ms = abba(
            partial(token_ms, over_ring, task, digests), partial(token_ms, in_process, task, digests), ROUNDS
        )
    if len(digests) != 1:
        raise BenchError(f"{mode} mode: the engine in this process and the one of weightd came to different logits")
    return {
        "what": f"generation, {mode}, {pool_share:.0%} of the FFN in the pool",
        "shared_memory_ms": median(shared_ms),
        "in_process_ms": median(own_ms),
        "shared_memory_over_in_process": median(shared_ms) / median(own_ms),
    }


def generation_rows(shape: str, folder: Path) -> list[Row]:
    """Raises BenchError and OSError, as planted_store() does."""
    planted = planted_store(shape, folder)
    return [compared(planted, *kind) for kind in KINDS]
