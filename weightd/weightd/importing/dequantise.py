"""Turns the bytes of a checkpoint into elements of F32, BF16 or F16. Quantised blocks become F32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightd import _native
from weightd.importing.families import TensorSource
from weightd_proto.encodings import DTYPES, is_plain

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Elements:
    """Little-endian elements of one dtype, as a flat array of bytes."""

    dtype: str
    data: Bytes

    def into(self, target: Bytes, dtype: str) -> None:
        """Converts the elements to `dtype` and writes them into `target`. The same dtype is copied bit for bit."""
        _native.convert(self.data, self.dtype, target, dtype)

    def as_dtype(self, dtype: str) -> Bytes:
        target = np.empty(len(self.data) // DTYPES[self.dtype].bytes * DTYPES[dtype].bytes, np.uint8)
        self.into(target, dtype)
        return target


def row_elements(source: TensorSource) -> int:
    """Elements of a row."""
    shape = source.tensor.shape
    return source.tensor.elements // rows(source) if shape else 1


def rows(source: TensorSource) -> int:
    """Rows of the tensor. A vector is one row, unless its elements must be permuted back: then each is a row."""
    shape = source.tensor.shape
    if len(shape) == 1 and not (source.undo and source.undo.heads):
        return 1
    return shape[0] if shape else 1


def rows_together(source: TensorSource) -> int:
    """How many rows must be dequantised together: those of a head if they are permuted, otherwise 1."""
    return rows(source) // source.undo.heads if source.undo and source.undo.heads else 1


def dequantise(source: TensorSource, stored: memoryview) -> Elements:
    """The elements of `stored`, which holds whole rows, a multiple of `rows_together`."""
    data = np.frombuffer(stored, np.uint8)
    plain = is_plain(source.tensor.encoding)
    elements = Elements(source.tensor.dtype, data) if plain else _from_blocks(source, data)
    if source.undo is None:
        return elements
    if source.undo.heads:
        row_bytes = row_elements(source) * DTYPES[elements.dtype].bytes
        return Elements(elements.dtype, _without_interleaving(elements.data, rows_together(source), row_bytes))
    values = elements.as_dtype("F32").view(np.float32) - np.float32(1)
    return Elements("F32", values.view(np.uint8))


def _without_interleaving(data: Bytes, head_rows: int, row_bytes: int) -> Bytes:
    """Permutes the rows of each head from (pair, half) order back to (half, pair) order."""
    pairs = data.reshape(-1, head_rows // 2, 2, row_bytes)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1)


def _from_blocks(source: TensorSource, data: Bytes) -> Elements:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    row_bytes = source.tensor.bytes_of(row_elements(source))
    values = dequantize(data.reshape(-1, row_bytes), GGMLQuantizationType[source.tensor.encoding.format])
    return Elements("F32", np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8))
