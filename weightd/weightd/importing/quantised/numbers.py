"""The values of numbers that have their scales, and perhaps zeros, in tensors of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from weightd.disk.tensors import BlockScales, Packing, SourceTensor
from weightd.errors import CheckpointError
from weightd.importing.plan import ElementRun
from weightd_proto.encodings import DTYPES, NF4_NUMBERS, PACKED_E2M1, PACKED_NF4

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def scaled_values(run: ElementRun, stored: Sequence[memoryview]) -> Floats:
    """The elements of a run: (number - zero) * factor, in F32. `stored`: the bytes of its extents.

    CheckpointError for one that is NaN or infinite.
    """
    tensor, width = run.tensor, run.tensor.row_elements
    scales = tensor.scales
    assert scales is not None
    values = numbers_of(tensor, np.frombuffer(stored[0], np.uint8)).reshape(-1, width)
    factors, zeros = of_blocks(run, stored)
    if zeros is not None:
        _apply(np.subtract, values, _spread(scales, zeros, width))
    elif scales.zero:
        values -= np.float32(scales.zero)
    with np.errstate(over="ignore"):
        _apply(np.multiply, values, _spread(scales, factors, width))
    check_finite(run, values)
    return values.reshape(-1)


def check_finite(run: ElementRun, values: Floats) -> None:
    """CheckpointError for a dequantised value [rows, columns] that is NaN or infinite."""
    finite = np.isfinite(values)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise CheckpointError(
            f"{run.tensor.name} in {run.tensor.path} is NaN or infinite in row {run.first_row + row}, column {column}: "
            "download the file again"
        )


def numbers_of(tensor: SourceTensor, data: Bytes) -> Floats:
    """Numbers as they are stored, flat: without scales and zeros."""
    if tensor.packing is not None:
        return unpacked(tensor.packing, data, tensor.row_elements).astype(np.float32)
    format = tensor.encoding.format
    if format in VALUES:
        return np.take(VALUES[format], data, axis=0).reshape(-1)
    return data.view(DTYPES[format].numpy).astype(np.float32)


def unpacked(packing: Packing, data: Bytes, width: int) -> Bytes:
    """The integers of whole rows, a byte each, flat. `width`: of a row."""
    numbers = packing.numbers
    codes = np.stack([data & 15, data >> 4], axis=-1) if packing.bits == 4 else data
    words = codes.reshape(-1, numbers)
    if packing.order != tuple(range(numbers)):
        in_order = np.empty_like(words)
        in_order[:, packing.order] = words
        words = in_order
    if packing.across:
        return np.ascontiguousarray(words.reshape(-1, width, numbers).swapaxes(1, 2)).reshape(-1)
    return words.reshape(-1)


def of_blocks(run: ElementRun, stored: Sequence[memoryview]) -> tuple[Floats, Floats | None]:
    """The factors of each row's blocks, and their zeros, if they have some: [rows, blocks of a row].

    CheckpointError for a factor that is NaN or infinite, unless factors are exponents.
    """
    scales = run.tensor.scales
    assert scales is not None
    first, end = scales.rows_of(run.first_row, run.end_row)
    if scales.transposed and scales.groups:
        which = np.frombuffer(scales.groups, np.int32)[run.first_row : run.end_row]
    else:
        rows = np.arange(run.first_row, run.end_row)
        matrix = rows // scales.matrix_rows
        which = matrix * scales.tensor.shape[-2] + rows % scales.matrix_rows // scales.rows - first
    factors = _factors(scales, np.frombuffer(stored[1], np.uint8), first).reshape(end - first, -1)
    zeros = None
    if scales.zeros is not None:
        zeros = _zeros(scales, scales.zeros, np.frombuffer(stored[2], np.uint8), first)[which]
    return factors[which], zeros


def zero_points(scales: BlockScales, zeros: SourceTensor, data: Bytes) -> Floats:
    """What is subtracted from the numbers of each block, of whole rows of `zeros`: [rows, blocks of a row]."""
    found = numbers_of(zeros, data).reshape(-1, zeros.row_elements) + np.float32(scales.zero)
    return found if zeros.packing is None else np.mod(found, np.float32(1 << zeros.packing.bits))


def _zeros(scales: BlockScales, zeros: SourceTensor, data: Bytes, first: int) -> Floats:
    """From row `first` on; the rows that share a word with it are in `data`, too."""
    return zero_points(scales, zeros, data)[first % zeros.rows_together :]


def _spread(scales: BlockScales, of_blocks: Floats, width: int) -> Floats:
    """What is given for a row's blocks, for its values: [rows, blocks, 1] if all have as many values, else [rows,
    values]."""
    if scales.groups and not scales.transposed:
        return of_blocks[:, np.frombuffer(scales.groups, np.int32)]
    if width % scales.columns == 0:
        return of_blocks[:, : width // scales.columns, np.newaxis]
    return np.repeat(of_blocks, scales.columns, axis=1)[:, :width]


def _apply(operation: np.ufunc, values: Floats, spread: Floats) -> None:
    target = values if spread.ndim == 2 else values.reshape(*spread.shape[:2], -1)
    operation(target, spread, out=target)


def _factors(scales: BlockScales, data: Bytes, first_row: int) -> Floats:
    dtype, nested = scales.tensor.dtype, scales.nested
    if nested is not None:
        begin = first_row * scales.tensor.row_elements
        of_codes = np.arange(begin, begin + len(data)) // nested.size
        found = np.frombuffer(nested.numbers, np.float32)[data] * np.frombuffer(nested.factors, np.float32)[of_codes]
        return _finite(scales, found + np.float32(nested.offset))
    factors = _EXPONENTS[dtype][data] if dtype in _EXPONENTS else _finite(scales, as_floats(dtype, data))
    return factors / np.float32(scales.divisor) * np.float32(scales.multiplier)


def _finite(scales: BlockScales, factors: Floats) -> Floats:
    if not np.isfinite(factors).all():
        name, path = scales.tensor.name, scales.tensor.path
        raise CheckpointError(f"{name} in {path} has a scale that is NaN or infinite: download the file again")
    return factors


def as_floats(dtype: str, data: Bytes) -> Floats:
    if dtype in VALUES:
        return VALUES[dtype][data]
    if dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view({"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


def _e4m3() -> npt.NDArray[np.float32]:
    """The value of each byte: 4 bits of an exponent, 3 of a fraction, no infinity."""
    normal = [(8 + byte % 8) * 2.0 ** (byte // 8 - 10) for byte in range(8, 127)]
    magnitudes = [*(byte * 2.0**-9 for byte in range(8)), *normal, math.nan]
    return np.array([*magnitudes, *(-value for value in magnitudes)], np.float32)


def _exponents() -> npt.NDArray[np.float32]:
    """2 ** (byte - 127). That of 255 is infinite."""
    with np.errstate(over="ignore"):
        return np.ldexp(np.float32(1), np.arange(256) - 127).astype(np.float32)


_E2M1 = np.array([sign * value for sign in (1, -1) for value in (0.0, 0.5, 1, 1.5, 2, 3, 4, 6)], np.float32)
# What a byte holds: one number, or two.
VALUES = {
    "F8_E4M3": _e4m3(),
    "F8_E5M2": (np.arange(256) << 8).astype(np.uint16).view(np.float16).astype(np.float32),
    PACKED_E2M1.format: np.array([(_E2M1[byte & 15], _E2M1[byte >> 4]) for byte in range(256)]),
    PACKED_NF4.format: np.array([(NF4_NUMBERS[b >> 4], NF4_NUMBERS[b & 15]) for b in range(256)], np.float32),
}
# In F8_E8M0, 255 is not a number.
_EXPONENTS = {"U8": _exponents(), "F8_E8M0": np.append(_exponents()[:255], np.float32(np.nan))}
