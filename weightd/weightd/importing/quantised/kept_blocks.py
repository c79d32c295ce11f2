"""Which tensors are kept in blocks of GGML's formats that hold the same values, and these blocks.

    Q4_0    integers of 4 bits whose zero is 8
    Q8_0    integers of 8 bits whose zero is the middle
    MXFP4   floats of 4 bits with an exponent for 32

A block of 32 inputs has one scale, in half precision. So groups must be whole blocks in order, and half precision must
hold every scale. Whether it does is checked before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from weightd.disk.read_ahead import ReadAhead
from weightd.disk.tensors import BlockScales, SourceTensor
from weightd.importing.plan import ElementRun, runs_of
from weightd.importing.quantised.numbers import as_floats, of_blocks, unpacked, zero_points
from weightd_proto.encodings import BLOCK_FORMATS, PACKED_E2M1, plain

Bytes = npt.NDArray[np.uint8]

VALUES = 32  # of a block
MXFP4 = "MXFP4"
INTEGERS = {4: "Q4_0", 8: "Q8_0"}  # by bits


def with_kept_formats(tensors: Mapping[str, SourceTensor]) -> tuple[dict[str, SourceTensor], list[str]]:
    """The tensors, with the formats in which they can be kept (BlockScales.kept), and why others cannot."""
    found, reasons = {}, dict[str, list[str]]()
    for name, tensor in tensors.items():
        scales = tensor.scales
        if scales is None:
            found[name] = tensor
            continue
        reason = _obstacle(tensor, scales)
        if reason:
            reasons.setdefault(reason, []).append(tensor.name)
        found[name] = tensor if reason else replace(tensor, scales=replace(scales, kept=_format(tensor, scales)))
    return found, [f"{_counted(names)} dequantised, because {reason}" for reason, names in reasons.items()]


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} matrices, first {names[0]}, are" if len(names) > 1 else f"{names[0]} is"


def _format(tensor: SourceTensor, scales: BlockScales) -> str:
    """Which would hold the numbers, or nothing."""
    if tensor.encoding == PACKED_E2M1:
        exponents = scales.tensor.encoding in (plain("U8"), plain("F8_E8M0"))
        return MXFP4 if exponents and (scales.rows, scales.columns) == (1, VALUES) else ""
    bits = 8 if tensor.encoding == plain("I8") else tensor.packing.bits if tensor.packing is not None else 0
    return INTEGERS.get(bits, "")


def _obstacle(tensor: SourceTensor, scales: BlockScales) -> str:
    """Why a tensor cannot be kept; empty: it can."""
    format = _format(tensor, scales)
    if not format:
        return f"no kernel computes on {_kind(tensor)}"
    if scales.groups:
        return "its groups are in another order than its inputs (desc_act, actorder)"
    inputs, size = (tensor.rows, scales.rows) if scales.transposed else (tensor.row_elements, scales.columns)
    if inputs % VALUES or size % VALUES:
        return f"groups of {size} of {inputs} inputs are not whole blocks of {VALUES}"
    if format == MXFP4:
        return ""
    middle = 0 if tensor.packing is None else 1 << (tensor.packing.bits - 1)
    if not _all_are(scales, middle):
        return "its zeros are not all in the middle"
    return "" if _fit_half(scales.tensor) else "half precision does not hold its scales"


def _kind(tensor: SourceTensor) -> str:
    return "numbers of NVFP4" if tensor.encoding == PACKED_E2M1 else f"numbers of {tensor.encoding.format}"


def _all_are(scales: BlockScales, middle: int) -> bool:
    """Of the zeros."""
    zeros = scales.zeros
    if zeros is None:
        return scales.zero == middle
    rows = scales.tensor.rows  # words at the end may have padding
    found = [zero_points(scales, zeros, data) for data in _whole(zeros)]
    return bool((np.concatenate(found)[:rows] == middle).all())


def _fit_half(scales: SourceTensor) -> bool:
    """NaN and infinity do: they are refused when they are written."""
    if scales.dtype == "F16":
        return True
    for data in _whole(scales):
        values = as_floats(scales.dtype, data)
        with np.errstate(over="ignore"):
            if not np.array_equal(values.astype(np.float16).astype(np.float32), values, equal_nan=True):
                return False
    return True


def _whole(tensor: SourceTensor) -> Iterator[Bytes]:
    runs = list(runs_of(tensor))
    with ReadAhead([extent for run in runs for extent in run.extents]) as read_ahead:
        for run in runs:
            with read_ahead.take_all(run.extents) as stored:
                yield np.frombuffer(stored[0], np.uint8)


# Blocks


def kept_blocks(run: ElementRun, stored: Sequence[memoryview]) -> Bytes:
    """The numbers of a run in blocks of the format in which its tensor is kept, flat. `stored`: the bytes of its
    extents.

    They lie as the numbers do: [rows, blocks of a row], or [rows of blocks, columns] if rows are inputs.
    """
    scales = run.tensor.scales
    assert scales is not None
    if scales.kept == MXFP4:
        return _mxfp4_blocks(stored)
    width, data = run.tensor.row_elements, np.frombuffer(stored[0], np.uint8)
    codes = data.view(np.uint8) if run.tensor.packing is None else unpacked(run.tensor.packing, data, width)
    factors, _ = of_blocks(run, stored)
    if scales.transposed:
        by_block = codes.reshape(-1, VALUES, width).swapaxes(1, 2)
        of_block = factors[::VALUES]
    else:
        by_block = codes.reshape(len(factors), -1, VALUES)
        of_block = np.repeat(factors, scales.columns // VALUES, axis=1)[:, : by_block.shape[1]]
    if scales.kept == "Q8_0":
        signed = by_block if run.tensor.packing is None else by_block ^ np.uint8(128)
        return _blocks(scales.kept, of_block, signed)
    return _blocks(scales.kept, of_block, by_block[..., : VALUES // 2] | by_block[..., VALUES // 2 :] << np.uint8(4))


def _blocks(format: str, factors: npt.NDArray[np.float32], codes: Bytes) -> Bytes:
    """`factors`: [rows, blocks], `codes`: [rows, blocks, bytes]."""
    blocks = np.empty((*factors.shape, BLOCK_FORMATS[format].bytes), np.uint8)
    halves = np.ascontiguousarray(factors.astype("<f2"))
    blocks[..., :2] = halves.view(np.uint8).reshape(*factors.shape, 2)
    blocks[..., 2:] = codes
    return blocks.reshape(-1)


def _mxfp4_blocks(stored: Sequence[memoryview]) -> Bytes:
    """Rows of PACKED_E2M1 with an exponent for 32 values. `stored`: values and exponents."""
    pairs = np.frombuffer(stored[0], np.uint8).reshape(-1, VALUES // 2)
    codes = np.empty((len(pairs), VALUES), np.uint8)
    codes[:, 0::2], codes[:, 1::2] = pairs & 15, pairs >> 4
    blocks = np.empty((len(pairs), BLOCK_FORMATS[MXFP4].bytes), np.uint8)
    blocks[:, 0] = np.frombuffer(stored[1], np.uint8)
    blocks[:, 1:] = codes[:, : VALUES // 2] | codes[:, VALUES // 2 :] << 4  # of one code in each half of the block
    return blocks.reshape(-1)
