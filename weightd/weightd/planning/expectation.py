"""What a token of a model is expected to read from flash, and how long it takes.

Reads. Exact mode of a dense model reads what the pool does not hold: it goes through all cells in order, and the pool
keeps what it has. A mixture of experts reads the cells of the experts that the router picks and the pool does not hold.
Predict mode reads the neurons that are predicted, were not in the window, and are not among the hottest.

Time. A mixture and predict mode learn in each layer what to read. They compute what is in the pool and what arrives
while the rest is read, so the FFNs take as long as reading or their kernels, whichever is slower, and all else adds to
that.
Exact mode reads ahead while it computes, but its kernels are slower then, because weightd's threads take and verify
chunks meanwhile. So a part of whichever is shorter, reading or computing, adds to the other.
scripts/bench_plan.py measures how near this comes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightd._native import POOL_SLOTS_MIN, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN, EngineThread
from weightd.importing.client_process import TokenCost
from weightd.planning.firing import Firing
from weightd.serving.served_models import demand_of
from weightd.store.calibration import predictors_of
from weightd.store.device_profile import DeviceProfile
from weightd.store.hotness import used_cells
from weightd_proto.dram import slots_wanted
from weightd_proto.encodings import has_experts, part_bytes
from weightd_proto.weightd_pb2 import Model

READ_BYTES_MAX = 1 << 20  # of one request: neighbours are read together
# Of what is shorter, reading or computing, in exact mode: between 0.2 and 0.46 were measured on two cores.
NOT_AT_ONCE = 0.4
LENT_NEVER = 1 / 16  # of the pool: no window can have it
# The share of picks that the pool finds when it holds this share of a layer's experts: its own policy on a trace with
# the locality that was published for Gemma 4 26B-A4B (scripts/simulate_pool.py: "mixture"). Between 32 and 512 experts
# it differs by 2 points at most. Where some experts are popular for good, the pool finds more.
EXPERT_HITS = ((0.0, 0.0), (0.125, 0.40), (0.25, 0.64), (0.5, 0.85), (1.0, 1.0))

Shares = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PoolSize:
    """What --dram leaves for cells.

    Attributes:
        slots: cells that the pool holds.
        share_slots: the guaranteed share of a session.
        cells: of the model.
    """

    slots: int
    share_slots: int
    cells: int
    cell_bytes: int


@dataclass(frozen=True)
class Reads:
    """The reads of a token.

    Attributes:
        request_bytes: of one request.
        depth: requests in flight.
    """

    read_bytes: float
    request_bytes: int
    depth: float


@dataclass(frozen=True)
class Expectation:
    """What a token is expected to cost."""

    pool: PoolSize
    reads: Reads
    read_s: float
    compute_s: float  # kernels, and what a token costs besides
    token_s: float


def pool_of(record: Model, dram_bytes: int) -> PoolSize:
    """The pool of a weightd that serves this model alone. `dram_bytes`: at least the model's minimum."""
    cells, cell_bytes = sum(layer.cells for layer in record.layers), record.bundle.cell_bytes
    spare_bytes = dram_bytes - demand_of(record).minimum_bytes
    assert spare_bytes >= 0
    # demand_of() has room for a large segment of each table. One client's rows take the smallest.
    spare_bytes += sum(max(0, min(SEGMENT_BYTES_MAX, t.bundles_file_bytes) - SEGMENT_BYTES_MIN) for t in record.tables)
    slots = POOL_SLOTS_MIN + spare_bytes // cell_bytes
    share = EngineThread.share_slots(slots, slots_wanted(cell_bytes), cells)
    return PoolSize(min(slots, cells), share, cells, cell_bytes)


def expect(
    record: Model, cost: TokenCost, device: DeviceProfile, dram_bytes: int, firing: Firing | None = None
) -> Expectation:
    """What a token of one client costs once the pool is warm.

    Args:
        firing: of predict mode; None: exact mode.
    """
    pool = pool_of(record, dram_bytes)
    if firing is not None:
        reads, computed = _predicted(record, pool, firing)
    elif has_experts(record):
        reads, computed = _mixture(record, pool, cost.picks), 1.0
    else:
        reads, computed = _dense(record, pool), 1.0
    read_s = reads.read_bytes / (gb_per_s(device, reads) * 1e9)
    compute_s = cost.besides_s + computed * cost.ffn_s
    token_s = cost.besides_s + max(read_s, computed * cost.ffn_s)
    if firing is None and not has_experts(record):
        token_s = max(read_s, compute_s) + NOT_AT_ONCE * min(read_s, compute_s)
    lookup_s = _lookup_s(record, device)
    return Expectation(pool, reads, read_s + lookup_s, compute_s, token_s + lookup_s)


def predictors_bytes(record: Model) -> int:
    file = predictors_of(record.calibration)
    return 0 if file is None else file.size_bytes


def _lookup_s(record: Model, device: DeviceProfile) -> float:
    """A token reads a row of each table before its first layer, one after the other."""
    rows = [table.bundle.cell_bytes for table in record.tables]
    return sum(size / (gb_per_s(device, Reads(size, size, 1)) * 1e9) for size in rows)


def _dense(record: Model, pool: PoolSize) -> Reads:
    """Cells that are on their way take the place of cells that stay."""
    missing = 0 if pool.slots == pool.cells else min(pool.cells, pool.cells - pool.slots + pool.share_slots)
    depth = pool.share_slots * pool.cell_bytes / READ_BYTES_MAX
    return Reads(missing * pool.cell_bytes, READ_BYTES_MAX, depth)


def _mixture(record: Model, pool: PoolSize, picks: int) -> Reads:
    """FFNs that are not mixtures are used by every token, so that the pool keeps them first."""
    always = sum(layer.cells for layer in record.layers if not layer.experts)
    mixtures = [layer for layer in record.layers if layer.experts]
    routed = sum(layer.cells for layer in mixtures)
    picked = sum(layer.cells * min(picks, layer.experts) / layer.experts for layer in mixtures)
    held = min(1.0, max(0, pool.slots - always) / routed)
    missing = picked * (1 - expert_hits(held)) + max(0, always - pool.slots)
    request_bytes = min(READ_BYTES_MAX, pool.cell_bytes * max(layer.cells // layer.experts for layer in mixtures))
    depth = missing * pool.cell_bytes / request_bytes / len(record.layers)
    return Reads(missing * pool.cell_bytes, request_bytes, depth)


def expert_hits(held: float) -> float:
    """The share of picks that a pool finds which holds this share of the experts."""
    shares, hits = zip(*EXPERT_HITS, strict=True)
    return float(np.interp(held, shares, hits))


def _predicted(record: Model, pool: PoolSize, firing: Firing) -> tuple[Reads, float]:
    """The reads, and the bytes that are computed as a share of all FFN weights.

    As if neurons fired independently of each other, and the pool had the hottest ones beside the window.
    """
    ends = np.cumsum([layer.neurons for layer in record.layers])[:-1]
    by_layer = np.split(firing.predicted, ends)
    used = np.concatenate([used_cells(shares, record.bundle.bundles_per_cell) for shares in by_layer])
    missing = missed_cells(used, pool.slots, firing.window)
    *first_parts, down = part_bytes(record.bundle)
    touched = float(firing.predicted.sum()) * sum(first_parts) + float(firing.fires.sum()) * down
    touched += predictors_bytes(record)
    whole = record.bundle.bundle_bytes * len(firing.predicted)
    return Reads(missing * pool.cell_bytes, pool.cell_bytes, missing / len(record.layers)), touched / whole


def missed_cells(used: Shares, slots: int, window: int) -> float:
    """Cells that a token wants and does not find, of cells that a share `used` of the tokens want.

    The pool holds the hottest cells, and of the others those of the window. A window that does not fit is shorter.
    """
    hottest = np.sort(used)[::-1]
    low, high = 0.0, float(window)
    if _in_window(hottest, high) > slots * (1 - LENT_NEVER):
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if _in_window(hottest, middle) <= slots * (1 - LENT_NEVER) else (low, middle)
        window_tokens = low
    else:
        window_tokens = high
    beside = 1 - (1 - hottest) ** window_tokens
    held = np.arange(len(hottest) + 1) + np.concatenate([np.cumsum(beside[::-1])[::-1], [0.0]])
    count = int(np.searchsorted(held, slots, "right"))  # of the hottest cells that stay
    cold = hottest[max(0, count - 1) :]
    return float((cold * (1 - cold) ** window_tokens).sum())


def _in_window(used: Shares, tokens: float) -> float:
    return float((1 - (1 - used) ** tokens).sum())


def gb_per_s(device: DeviceProfile, reads: Reads) -> float:
    """The device's speed for such reads, between the sizes and depths that were measured."""
    depths = sorted({row.depth for row in device.random})
    speeds = [_at_depth(device, depth, reads.request_bytes) for depth in depths]
    depth = min(max(reads.depth, depths[0]), depths[-1])
    return math.exp(np.interp(math.log(depth), np.log(depths), np.log(speeds)))


def _at_depth(device: DeviceProfile, depth: int, read_bytes: int) -> float:
    rows = sorted((row for row in device.random if row.depth == depth), key=lambda row: row.read_bytes)
    sizes, speeds = np.log([row.read_bytes for row in rows]), [row.gb_per_s for row in rows]
    return float(np.interp(math.log(read_bytes), sizes, speeds))
