"""Turns the bytes of a checkpoint into elements of F32, BF16 or F16. Quantised numbers become F32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightd import _native
from weightd.disk.tensors import WIDE
from weightd.importing.plan import ElementRun
from weightd.importing.quantised.kept_blocks import kept_blocks
from weightd.importing.quantised.numbers import check_finite, scaled_values
from weightd_proto.encodings import BLOCK_FORMATS, DTYPES, E4M3_MAX

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
        return Elements("F32", scaled_values(run, stored).view(np.uint8))
    elements = Elements(tensor.dtype, data) if tensor.is_plain else _from_blocks(run, data)
    if tensor.undo is None:
        return elements
    if tensor.undo.heads:
        row_bytes = tensor.row_elements * DTYPES[elements.dtype].bytes
        return Elements(elements.dtype, _without_interleaving(elements.data, tensor.rows_together, row_bytes))
    values = elements.as_dtype("F32").view(np.float32) - np.float32(1)
    return Elements("F32", values.view(np.uint8))


def kept_rows(run: ElementRun, stored: Sequence[memoryview]) -> Elements:
    """The rows of a run in blocks, in the order of transformers: as they are stored, or with the scales that lie apart
    from them. `dtype` is their format."""
    if run.tensor.scales is not None:
        return Elements(run.tensor.scales.kept, kept_blocks(run, stored))
    tensor, data = run.tensor, np.frombuffer(stored[0], np.uint8)
    if tensor.undo is not None:
        data = _without_interleaving(data, tensor.rows_together, tensor.bytes_of(tensor.row_elements))
    return Elements(tensor.encoding.format, data)


def first_unusable(format: str, data: Bytes) -> int | None:
    """The first of the blocks whose scale is NaN or infinite, or of FP8 so large that a product with a code may be.

    `data`: whole blocks, of any shape.
    """
    record = BLOCK_FORMATS[format]
    blocks = data.reshape(-1, record.bytes)
    wrong = np.zeros(len(blocks), bool)
    for offset in record.scale_offsets:
        if record.scale_dtype == "F16":
            wrong |= blocks[:, offset + 1] & 0x7C == 0x7C  # all bits of the exponent
        elif record.scale_dtype == "F32":
            scales = np.ascontiguousarray(blocks[:, offset : offset + 4]).view("<f4")[:, 0]
            with np.errstate(over="ignore"):
                wrong |= ~np.isfinite(scales * np.float32(E4M3_MAX))
        else:
            assert record.scale_dtype == "F8_E8M0", f"scales of {record.scale_dtype}"
            wrong |= blocks[:, offset] == 0xFF  # the only one that is not a number
    return int(np.argmax(wrong)) if wrong.any() else None


def _without_interleaving(data: Bytes, head_rows: int, row_bytes: int) -> Bytes:
    """Permutes the rows of each head from (pair, half) order back to (half, pair) order."""
    pairs = data.reshape(-1, head_rows // 2, 2, row_bytes)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1)


def _from_blocks(run: ElementRun, data: Bytes) -> Elements:
    tensor = run.tensor
    if tensor.encoding == WIDE:
        with np.errstate(over="ignore"):  # becomes infinite, as in torch
            return Elements("F32", data.view("<f8").astype("<f4").view(np.uint8))
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    row_bytes = tensor.bytes_of(tensor.row_elements)
    with np.errstate(all="ignore"):  # scales that are damaged
        values = dequantize(data.reshape(-1, row_bytes), GGMLQuantizationType[tensor.encoding.format])
    found = np.ascontiguousarray(values, np.float32)
    check_finite(run, found)
    return Elements("F32", found.reshape(-1).view(np.uint8))
