"""Chooses the dtype in which a model is stored and computed. It is the same for all tensors, as in transformers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from weightd.disk.read_ahead import Extent, ReadAhead
from weightd.importing.dequantise import dequantise
from weightd.importing.families import TensorSource
from weightd_proto.encodings import COMPUTE_DTYPES

KEEP = "keep"


def extent_of(source: TensorSource) -> Extent:
    """The extent of the whole tensor."""
    tensor = source.tensor
    return Extent(tensor.path, tensor.offset_bytes, tensor.bytes_of(tensor.elements))


def stored_dtype(sources: Mapping[str, TensorSource], request: str) -> str:
    """F32, BF16 or F16. `keep` means the narrowest dtype that holds every value of the checkpoint exactly.

    For matrices the dtype decides. Vectors (norms, biases) may have a wider dtype than the matrices: llama.cpp stores
    norms in F32 beside F16 matrices. For them the values decide, so that they do not double the size of the model.
    """
    if request != KEEP:
        return COMPUTE_DTYPES[request]
    matrices = {source.tensor.dtype for source in sources.values() if len(source.tensor.shape) > 1}
    if len(matrices) != 1:
        return "F32"
    (dtype,) = matrices
    vectors = [source for source in sources.values() if len(source.tensor.shape) == 1]
    return dtype if dtype == "F32" or _hold_exactly(vectors, dtype) else "F32"


def _hold_exactly(vectors: list[TensorSource], dtype: str) -> bool:
    others = [source for source in vectors if source.tensor.dtype != dtype or source.undo is not None]
    with ReadAhead([extent_of(source) for source in others]) as read_ahead:
        for source in others:
            with read_ahead.take(extent_of(source)) as stored:
                elements = dequantise(source, stored)
                values = elements.as_dtype("F32").view(np.float32)
                narrow = type(elements)(dtype, elements.as_dtype(dtype)).as_dtype("F32").view(np.float32)
                if not np.array_equal(values, narrow, equal_nan=True):
                    return False
    return True
