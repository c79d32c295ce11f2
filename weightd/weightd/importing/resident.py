"""The layout of resident.safetensors: its header, and the offset of each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from weightd_proto.encodings import BLOCK_FORMATS, encoding_named, stored_bytes
from weightd_proto.safetensors_header import header_of
from weightd_proto.weightd_pb2 import Tensor

TENSOR_ALIGNMENT_BYTES = 64

Shape = tuple[int, ...]


def lay_out_resident(kinds: Mapping[str, tuple[str, Shape]], block_bytes: int) -> tuple[bytes, list[Tensor]]:
    """The header, padded so that the data begin on a block boundary, and the tensors in order, without checksums.

    `kinds`: dtypes or formats of blocks, and shapes. For safetensors, rows in blocks are rows of bytes.

    Tensors whose size is a multiple of 64 come first, so that they are all aligned. Padding between tensors is not
    possible, because safetensors allows no holes.
    """
    sizes = {name: stored_bytes(encoding_named(dtype), prod(shape)) for name, (dtype, shape) in kinds.items()}
    order = sorted(sizes, key=lambda name: (sizes[name] % TENSOR_ALIGNMENT_BYTES != 0, -sizes[name], name))
    header = header_of({name: _as_safetensors(*kinds[name]) for name in order}, block_bytes, {"format": "pt"})
    tensors = []
    offset_bytes = len(header)
    for name in order:
        (dtype, shape), size_bytes = kinds[name], sizes[name]
        tensors.append(Tensor(name=name, dtype=dtype, shape=shape, offset_bytes=offset_bytes, size_bytes=size_bytes))
        offset_bytes += size_bytes
    return header, tensors


def _as_safetensors(dtype: str, shape: Shape) -> tuple[str, Shape]:
    if dtype not in BLOCK_FORMATS:
        return dtype, shape
    return "U8", (*shape[:-1], stored_bytes(encoding_named(dtype), shape[-1]))
