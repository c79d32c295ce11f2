"""Tensors of numbers, put together with the tensors that hold their scales and zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weightd.disk.tensors import BlockScales, Packing, SourceTensor
from weightd.errors import CheckpointError
from weightd_proto.encodings import DTYPES, plain
from weightd_proto.weightd_pb2 import Encoding

Tensors = Mapping[str, SourceTensor]

FLOATS = ("F8_E4M3", "F8_E5M2")
NVFP4_VALUES = 16  # with one scale
FLOAT_DTYPES = ("F32", "BF16", "F16")
EXPONENTS = (plain("U8"), plain("F8_E8M0"))
BITS = (4, 8)


@dataclass(frozen=True)
class QuantisedTensors:
    """The tensors of a checkpoint that is published quantised.

    Attributes:
        settings: its quantization_config.
        dtype: to which it is dequantised where an import keeps dtypes.
        notes: what a user should know; readers add to them.
    """

    path: Path
    tensors: Tensors
    settings: Mapping[str, Any]
    dtype: str
    notes: list[str] = field(default_factory=list)

    def need(self, name: str, of: SourceTensor) -> SourceTensor:
        """CheckpointError if it is missing."""
        if name not in self.tensors:
            raise CheckpointError(f"{of.name} has no {name} in {of.path}: download the checkpoint again")
        return self.tensors[name]


def scaled(
    tensor: SourceTensor, scales: SourceTensor, dtype: str, block: Any = None, in_parts: bool = False
) -> SourceTensor:
    """`block`: its rows and columns by the configuration, or None: then the numbers of values and scales decide.

    `in_parts`: another scale is that of the whole tensor; only then may these be of F8_E4M3.
    """
    shape = as_matrix(scales, tensor)
    if len(tensor.shape) < 2 or len(shape) != len(tensor.shape):
        raise misfit(scales, tensor)
    *matrices, rows, width = tensor.shape
    sizes = block if isinstance(block, list | tuple) and len(block) == 2 else (None, None)
    found = [block_size(*of) for of in zip((rows, width), shape[-2:], sizes, strict=True)]
    if tensor.dtype in FLOATS and any(sizes) and not _as_said(shape[-2:], (rows, width), sizes):
        raise misfit(scales, tensor)
    if scales.dtype == "F8_E4M3" and found != [1, NVFP4_VALUES]:
        raise misfit(scales, tensor)
    known = scales.encoding in EXPONENTS or scales.dtype in FLOAT_DTYPES or (in_parts and scales.dtype == "F8_E4M3")
    if list(shape[:-2]) != matrices or None in found or not known:
        raise misfit(scales, tensor)
    of_blocks = BlockScales(replace(scales, shape=shape), found[0] or 1, found[1] or 1, rows, dtype)
    return replace(tensor, scales=of_blocks)


def _as_said(scales: Sequence[int], values: Sequence[int], sizes: Sequence[Any]) -> bool:
    """Whether blocks are of the configuration's size, or rows or the whole tensor have a scale instead."""
    by_block = zip(scales, values, sizes, strict=True)
    return all(block_size(of, 1, size) == of or count == -(-of // size) for count, of, size in by_block)


def as_matrix(scales: SourceTensor, tensor: SourceTensor) -> tuple[int, ...]:
    """The shape of scales with as many dimensions as those of the tensor: one may stand for all, or for a row."""
    if prod(scales.shape) == 1:
        return (1,) * len(tensor.shape)
    return (*scales.shape, 1) if scales.shape == tensor.shape[:-1] else scales.shape


def misfit(scales: SourceTensor, tensor: SourceTensor) -> CheckpointError:
    return CheckpointError(
        f"{scales.name} has shape {list(scales.shape)} of {scales.dtype} in {scales.path}, which are no scales of "
        f"{tensor.name} {list(tensor.shape)}"
    )


def block_size(values: int, scales: int, configured: Any = None) -> int | None:
    """How many values have one scale, in one dimension. The last block may be shorter."""
    if type(configured) is int and configured > 0 and -(-values // configured) == scales:
        return max(1, min(configured, values))
    return values // scales if scales and values and values % scales == 0 else None


def packed(tensor: SourceTensor, shape: tuple[int, int], packing: Packing) -> SourceTensor:
    """The integers in a matrix of 32-bit words."""
    encoding = Encoding(format=f"U{packing.bits} in words", block_values=packing.numbers, block_bytes=4)
    return replace(tensor, shape=shape, encoding=encoding, packing=packing)


def is_words(tensor: SourceTensor) -> bool:
    return tensor.dtype in ("I32", "U32") and len(tensor.shape) == 2


def small_values(tensor: SourceTensor) -> npt.NDArray[np.generic]:
    """The values of a plain tensor, read now: it is small."""
    count, numpy = tensor.elements, DTYPES[tensor.encoding.format].numpy
    values = np.fromfile(tensor.path, numpy, count, offset=tensor.offset_bytes)
    if len(values) != count:
        raise CheckpointError(f"{tensor.path} is incomplete: it ends inside of {tensor.name}; download it again")
    return values


def group_order(groups: SourceTensor, values: int, count: int, size: int) -> bytes:
    """The group of each value, as int32; empty if they are in order.

    Args:
        values, count, size: how many values, groups, and values of a group there are.
    """
    if groups.dtype != "I32" or groups.elements != values:
        raise CheckpointError(
            f"{groups.name} has shape {list(groups.shape)} of {groups.dtype} in {groups.path}, not a group for each of "
            f"{values} inputs"
        )
    found = small_values(groups).astype(np.int32)
    if found.min(initial=0) < 0 or found.max(initial=0) >= count:
        raise CheckpointError(f"{groups.name} names a group beyond the {count} that there are, in {groups.path}")
    return b"" if np.array_equal(found, np.arange(values) // size) else found.tobytes()
