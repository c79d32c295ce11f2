"""Chooses the dtype in which a model is stored and computed. It is the same for all tensors, as in transformers."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from weightd.disk.read_ahead import Extent, ReadAhead
from weightd.disk.tensors import SourceTensor
from weightd.importing.dequantise import dequantise
from weightd_proto.encodings import COMPUTE_DTYPES

KEEP = "keep"


def stored_dtype(tensors: Collection[SourceTensor], request: str) -> str:
    """F32, BF16 or F16. `keep` means the narrowest dtype that holds every value of the checkpoint exactly.

    For matrices the dtype decides. Vectors (norms, biases) may have a wider dtype than the matrices: llama.cpp stores
    norms in F32 beside F16 matrices. For them the values decide, so that they do not double the size of the model.
    """
    if request != KEEP:
        return COMPUTE_DTYPES[request]
    matrices = {tensor.dtype for tensor in tensors if len(tensor.shape) > 1}
    if len(matrices) != 1:
        return "F32"
    (dtype,) = matrices
    vectors = [tensor for tensor in tensors if len(tensor.shape) <= 1]
    return dtype if dtype == "F32" or _hold_exactly(vectors, dtype) else "F32"


def _hold_exactly(vectors: list[SourceTensor], dtype: str) -> bool:
    others = [tensor for tensor in vectors if tensor.dtype != dtype or tensor.undo is not None]
    with ReadAhead([_extent_of(tensor) for tensor in others]) as read_ahead:
        for tensor in others:
            with read_ahead.take(_extent_of(tensor)) as stored:
                elements = dequantise(tensor, stored)
                values = elements.as_dtype("F32").view(np.float32)
                narrow = type(elements)(dtype, elements.as_dtype(dtype)).as_dtype("F32").view(np.float32)
                if not np.array_equal(values, narrow, equal_nan=True):
                    return False
    return True


def _extent_of(tensor: SourceTensor) -> Extent:
    """The extent of the whole tensor."""
    return Extent(tensor.path, tensor.offset_bytes, tensor.bytes_of(tensor.elements))
