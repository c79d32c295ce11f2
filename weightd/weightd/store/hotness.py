"""Which cells of a model are hot: what calibration foretells, and what a daemon remembers from one start to the next.

A byte for each cell, layer after layer, in the code of weightd/native/pool/replacement.h:
64 + 8 log2(uses / the mean of all cells), from 1 to 127; 0 for a cell that is never used; and in the highest bit
whether it was in the pool. It only decides what is read back and what is evicted: a wrong value costs reads, never a
result.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from weightd.disk.safetensors_file import read_safetensors
from weightd.disk.uncached_file import UncachedReader, aligned_buffer
from weightd.errors import CheckpointError
from weightd.store.calibration import calibration_path
from weightd.store.store import Store
from weightd_proto import weightd_pb2
from weightd_proto.files import STATISTICS_FILE

logger = logging.getLogger(__name__)

MEAN = 64
MOST = 127
PER_OCTAVE = 8

Hotness = npt.NDArray[np.uint8]
Shares = npt.NDArray[np.float32]


def known_hotness(store: Store, model: weightd_pb2.Model) -> Hotness | None:
    """What an earlier daemon remembered of the model, else what its calibration foretells, else None."""
    remembered = store.hotness(model.name)
    if remembered is not None and len(remembered) == sum(layer.cells for layer in model.layers):
        return remembered
    return calibrated_hotness(store, model)


def calibrated_hotness(store: Store, model: weightd_pb2.Model) -> Hotness | None:
    """From the shares of tokens at which calibration's predictors wanted each neuron; None if they cannot be read."""
    if not model.HasField("calibration"):
        return None
    try:
        layers = _predicted_shares(store, model)
    except (CheckpointError, OSError) as error:
        logger.warning("what calibration says of %s cannot be used, its pool learns from use: %s", model.name, error)
        return None
    per_cell = model.bundle.bundles_per_cell
    return coded(np.concatenate([_used_cells(shares, per_cell) for shares in layers]))


def coded(uses: npt.NDArray[np.floating]) -> Hotness:
    """The code of each cell's uses, in any unit that is the same for all."""
    hotness = np.zeros(len(uses), np.uint8)
    used = uses > 0
    if used.any():
        octaves = np.log2(uses[used] / uses.mean())
        hotness[used] = np.clip(np.rint(MEAN + PER_OCTAVE * octaves), 1, MOST).astype(np.uint8)
    return hotness


def _used_cells(shares: Shares, bundles_per_cell: int) -> Shares:
    """The share of tokens that use each cell, were its neurons independent: 1 - product(1 - share)."""
    unused = np.ones(-(-len(shares) // bundles_per_cell) * bundles_per_cell, np.float32)
    unused[: len(shares)] -= np.clip(np.nan_to_num(shares), 0, 1)
    wanted: Shares = 1 - unused.reshape(-1, bundles_per_cell).prod(axis=1)
    return wanted


def _predicted_shares(store: Store, model: weightd_pb2.Model) -> list[Shares]:
    """`layers.{i}.predicted` of statistics.safetensors, [neurons] by position. CheckpointError, OSError."""
    path = calibration_path(store, model.name, model.calibration.version) / STATISTICS_FILE
    tensors = read_safetensors(path)
    layers = []
    with UncachedReader(path) as reader:
        for index, layer in enumerate(model.layers):
            tensor = tensors.get(f"layers.{index}.predicted")
            if tensor is None or tensor.dtype != "F32" or tensor.shape != (layer.neurons,):
                raise CheckpointError(f"{path} has no layers.{index}.predicted of {layer.neurons} F32")
            buffer = aligned_buffer(reader.buffer_bytes(4 * layer.neurons))
            data = reader.read(tensor.offset_bytes, 4 * layer.neurons, buffer)
            layers.append(np.frombuffer(data, "<f4").copy())
    return layers
