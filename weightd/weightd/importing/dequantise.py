"""Turns the bytes of a checkpoint into elements of F32, BF16 or F16. Quantised blocks become F32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightd import _native
from weightd.disk.tensors import SourceTensor
from weightd_proto.encodings import DTYPES, is_plain

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Elements:
    """Little-endian elements of one dtype, as a flat array of bytes."""

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


def dequantise(tensor: SourceTensor, stored: memoryview) -> Elements:
    """The elements of `stored`, which holds whole rows, a multiple of `rows_together`."""
    data = np.frombuffer(stored, np.uint8)
    plain = is_plain(tensor.encoding)
    elements = Elements(tensor.dtype, data) if plain else _from_blocks(tensor, data)
    if tensor.undo is None:
        return elements
    if tensor.undo.heads:
        row_bytes = tensor.row_elements * DTYPES[elements.dtype].bytes
        return Elements(elements.dtype, _without_interleaving(elements.data, tensor.rows_together, row_bytes))
    values = elements.as_dtype("F32").view(np.float32) - np.float32(1)
    return Elements("F32", values.view(np.uint8))


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
