"""Turns the bytes of a checkpoint into elements of F32, BF16 or F16. Quantised numbers become F32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightd import _native
from weightd.disk.tensors import BlockScales, SourceTensor
from weightd.importing.plan import ElementRun
from weightd_proto.encodings import BLOCK_FORMATS, DTYPES, PACKED_E2M1

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Elements:
    """Little-endian elements of one dtype, as a flat array of bytes. Those of kept_rows() are blocks."""

    dtype: str
    data: Bytes

    def into(self, target: Bytes, dtype: str) -> None:
        """Converts the elements to `dtype` and writes them into `target`. The same dtype is copied bit for bit."""
        if self.dtype == dtype:
            target[:] = self.data
        else:
            _native.convert(self.data, self.dtype, target, dtype)

    def as_dtype(self, dtype: str) -> Bytes:
        target = np.empty(len(self.data) // DTYPES[self.dtype].bytes * DTYPES[dtype].bytes, np.uint8)
        self.into(target, dtype)
        return target


def dequantise(run: ElementRun, stored: Sequence[memoryview]) -> Elements:
    """The elements of a run. `stored`: the bytes of its extents. Runs of tensors that are not plain are whole rows, a
    multiple of `rows_together`."""
    tensor = run.tensor
    data = np.frombuffer(stored[0], np.uint8)
    if tensor.scales is not None:
        return _scaled(run, tensor.scales, data, np.frombuffer(stored[1], np.uint8))
    elements = Elements(tensor.dtype, data) if tensor.is_plain else _from_blocks(tensor, data)
    if tensor.undo is None:
        return elements
    if tensor.undo.heads:
        row_bytes = tensor.row_elements * DTYPES[elements.dtype].bytes
        return Elements(elements.dtype, _without_interleaving(elements.data, tensor.rows_together, row_bytes))
    values = elements.as_dtype("F32").view(np.float32) - np.float32(1)
    return Elements("F32", values.view(np.uint8))


def kept_rows(run: ElementRun, stored: Sequence[memoryview]) -> Elements:
    """The rows of a run in blocks, as they are stored, in the order of transformers: `dtype` is their format."""
    tensor, data = run.tensor, np.frombuffer(stored[0], np.uint8)
    if tensor.undo is not None:
        data = _without_interleaving(data, tensor.rows_together, tensor.bytes_of(tensor.row_elements))
    return Elements(tensor.encoding.format, data)


def mxfp4_blocks(stored: Sequence[memoryview]) -> Elements:
    """Rows of PACKED_E2M1 with an exponent for 32 values, as GGML's blocks. `stored`: values and exponents."""
    values, size_bytes, *_ = BLOCK_FORMATS["MXFP4"]
    pairs = np.frombuffer(stored[0], np.uint8).reshape(-1, values // 2)
    codes = np.empty((len(pairs), values), np.uint8)
    codes[:, 0::2], codes[:, 1::2] = pairs & 15, pairs >> 4
    blocks = np.empty((len(pairs), size_bytes), np.uint8)
    blocks[:, 0] = np.frombuffer(stored[1], np.uint8)
    blocks[:, 1:] = codes[:, : values // 2] | codes[:, values // 2 :] << 4  # of one code in each half of the block
    return Elements("MXFP4", blocks.reshape(-1))


def first_unusable(format: str, data: Bytes) -> int | None:
    """The first of the blocks whose scale is NaN or infinite. `data`: whole blocks, of any shape."""
    record = BLOCK_FORMATS[format]
    blocks = data.reshape(-1, record.bytes)
    wrong = np.zeros(len(blocks), bool)
    for offset in record.scale_offsets:
        if record.scale_dtype == "F16":
            wrong |= blocks[:, offset + 1] & 0x7C == 0x7C  # all bits of the exponent
        else:
            assert record.scale_dtype == "F8_E8M0", f"scales of {record.scale_dtype}"
            wrong |= blocks[:, offset] == 0xFF  # the only one that is not a number
    return int(np.argmax(wrong)) if wrong.any() else None


def _without_interleaving(data: Bytes, head_rows: int, row_bytes: int) -> Bytes:
    """Permutes the rows of each head from (pair, half) order back to (half, pair) order."""
    pairs = data.reshape(-1, head_rows // 2, 2, row_bytes)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1)


def _from_blocks(tensor: SourceTensor, data: Bytes) -> Elements:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    row_bytes = tensor.bytes_of(tensor.row_elements)
    values = dequantize(data.reshape(-1, row_bytes), GGMLQuantizationType[tensor.encoding.format])
    return Elements("F32", np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8))


# Values with scales apart from them


def _scaled(run: ElementRun, scales: BlockScales, data: Bytes, scale_data: Bytes) -> Elements:
    """The product of each value with the factor of its block, in F32."""
    format, width = run.tensor.encoding.format, run.tensor.row_elements
    values = np.take(_VALUES[format], data, axis=0).reshape(-1, width)
    rows = np.array([scales.row_of(row) for row in range(run.first_row, run.end_row)])
    factors = _factors(scales, scale_data).reshape(-1, scales.tensor.row_elements)[rows - rows[0]]
    if width % scales.columns == 0:
        values.reshape(len(rows), -1, scales.columns)[...] *= factors[:, :, np.newaxis]
    else:
        values *= np.repeat(factors, scales.columns, axis=1)[:, :width]
    return Elements("F32", values.reshape(-1).view(np.uint8))


def _factors(scales: BlockScales, data: Bytes) -> npt.NDArray[np.float32]:
    dtype = scales.tensor.dtype
    if dtype in _EXPONENTS:
        return _EXPONENTS[dtype][data]
    return Elements(dtype, data).as_dtype("F32").view(np.float32)


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
_VALUES = {
    "F8_E4M3": _e4m3(),
    "F8_E5M2": (np.arange(256) << 8).astype(np.uint16).view(np.float16).astype(np.float32),
    PACKED_E2M1.format: np.array([(_E2M1[byte & 15], _E2M1[byte >> 4]) for byte in range(256)]),
}
# In F8_E8M0, 255 is not a number.
_EXPONENTS = {"U8": _exponents(), "F8_E8M0": np.append(_exponents()[:255], np.float32(np.nan))}
