"""FP8 neuron by neuron. Blocks of a down matrix are published along the neurons; a neuron's column has blocks along the
outputs. Where scales are those of blocks of rows and columns, or of a tensor, such a block has one scale, too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from weightd.importing.quantised.kept_blocks import FP8
from weightd.importing.units import Unit, UnitPart
from weightd_proto.encodings import BLOCK_FORMATS

Bytes = npt.NDArray[np.uint8]

SCALE_BYTES = 4


def neuron_format(units: Sequence[Unit]) -> str:
    """The format in which all neurons can be kept as published, one by one; empty: there is none."""
    parts = [part for unit in units for part in unit.parts]
    formats = {part.matrix.tensor.kept_format for part in parts if not part.columns}
    if len(formats) != 1 or not formats <= set(FP8):
        return ""
    (format,) = formats
    values = BLOCK_FORMATS[format].values
    return format if all(_has_columns(part, values) for part in parts if part.columns) else ""


def _has_columns(part: UnitPart, values: int) -> bool:
    """Whether so many numbers of a column, one below the other, have one scale."""
    matrix = part.matrix
    scales = matrix.tensor.scales
    if scales is None or scales.kept not in FP8 or matrix.rows % values:
        return False
    one_scale = scales.rows >= scales.matrix_rows or scales.rows % values == 0
    return one_scale and matrix.first_row % scales.matrix_rows % values == 0


def columns_of(data: Bytes, held: str, rows: int, neurons: npt.NDArray[np.int64], format: str) -> Bytes:
    """Columns of a matrix as blocks of `format` along its rows: [neurons, bytes].

    Args:
        data, held: the matrix, in blocks of the format `held` along its columns.
        neurons: the columns, rising.
    """
    across, along = BLOCK_FORMATS[held], BLOCK_FORMATS[format].values
    first, end = int(neurons[0]) // across.values, int(neurons[-1]) // across.values + 1
    blocks = data.reshape(rows, -1, across.bytes)[:, first:end]
    codes = blocks[..., SCALE_BYTES:].reshape(rows, -1)[:, neurons - first * across.values]
    scales = blocks[::along, :, :SCALE_BYTES][:, neurons // across.values - first]
    made = np.empty((len(neurons), rows // along, SCALE_BYTES + along), np.uint8)
    made[..., :SCALE_BYTES] = scales.swapaxes(0, 1)
    made[..., SCALE_BYTES:] = codes.T.reshape(len(neurons), -1, along)
    return made.reshape(len(neurons), -1)
