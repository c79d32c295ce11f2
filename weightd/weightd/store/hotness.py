"""Hotness: how often each cell of a model is used, predicted by calibration or learned by an earlier daemon.

Hotness is one byte per cell, layer after layer, in the code of weightd/native/pool/replacement.h. The low 7 bits are
64 + 8 log2(uses / mean uses of all cells), from 1 to 127, or 0 for a cell that is never used. The highest bit says
whether the cell was in the pool. Hotness decides what is read back at start and what is evicted. A wrong value costs
reads, and never changes a result.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from weightd.disk.safetensors_file import read_safetensors
from weightd.disk.uncached_file import UncachedReader, aligned_buffer
from weightd.errors import CheckpointError
from weightd.sizes import round_up
from weightd.store.calibration import calibration_path
from weightd.store.store import Store
from weightd_proto import weightd_pb2
from weightd_proto.encodings import DTYPES
from weightd_proto.files import STATISTICS_FILE

logger = logging.getLogger(__name__)

MEAN = 64
MOST = 127
PER_OCTAVE = 8

Hotness = npt.NDArray[np.uint8]
Shares = npt.NDArray[np.float32]


def known_hotness(store: Store, model: weightd_pb2.Model) -> Hotness | None:
    """The hotness that an earlier daemon learned, else that of the calibration, else None."""
    remembered = store.hotness(model.name)
    if remembered is not None and len(remembered) == sum(layer.cells for layer in model.layers):
        return remembered
    return calibrated_hotness(store, model)


def calibrated_hotness(store: Store, model: weightd_pb2.Model) -> Hotness | None:
    """The hotness by the shares of tokens for which the calibration's predictors want each neuron.

    None if there is no calibration, or if its statistics cannot be read.
    """
    if not model.HasField("calibration"):
        return None
    try:
        layers = calibrated_shares(store, model, "predicted")
    except (CheckpointError, OSError) as error:
        logger.warning(
            "the statistics of the calibration of %s cannot be used, the pool starts without them: %s",
            model.name,
            error,
        )
        return None
    per_cell = model.bundle.bundles_per_cell
    return coded(np.concatenate([used_cells(shares, per_cell) for shares in layers]))


def coded(uses: npt.NDArray[np.floating]) -> Hotness:
    """The code of each cell's uses. They can have any unit, because only ratios count."""
    hotness = np.zeros(len(uses), np.uint8)
    used = uses > 0
    if used.any():
        octaves = np.log2(uses[used] / uses.mean())
        hotness[used] = np.clip(np.rint(MEAN + PER_OCTAVE * octaves), 1, MOST).astype(np.uint8)
    return hotness


def used_cells(shares: npt.NDArray[np.floating], bundles_per_cell: int) -> npt.NDArray[np.floating]:
    """The share of tokens that use each cell if its neurons are independent: 1 - product(1 - share)."""
    unused = np.ones(round_up(len(shares), bundles_per_cell), shares.dtype)
    unused[: len(shares)] -= np.clip(np.nan_to_num(shares), 0, 1)
    wanted: npt.NDArray[np.floating] = 1 - unused.reshape(-1, bundles_per_cell).prod(axis=1)
    return wanted


def calibrated_shares(store: Store, model: weightd_pb2.Model, name: str) -> list[Shares]:
    """`layers.{i}.NAME` of statistics.safetensors, [neurons] by position. Raises CheckpointError, OSError.

    Args:
        name: `predicted` or `frequency`: the shares of tokens at which neurons were predicted, or fired.
    """
    path = calibration_path(store, model.name, model.calibration.version) / STATISTICS_FILE
    tensors = read_safetensors(path)
    layers = []
    with UncachedReader(path) as reader:
        for index, layer in enumerate(model.layers):
            tensor = tensors.get(f"layers.{index}.{name}")
            if tensor is None or tensor.dtype != "F32" or tensor.shape != (layer.neurons,):
                raise CheckpointError(f"{path} has no layers.{index}.{name} of {layer.neurons} F32")
            buffer = aligned_buffer(reader.buffer_bytes(DTYPES["F32"].bytes * layer.neurons))
            data = reader.read(tensor.offset_bytes, DTYPES["F32"].bytes * layer.neurons, buffer)
            layers.append(np.frombuffer(data, "<f4").copy())
    return layers
