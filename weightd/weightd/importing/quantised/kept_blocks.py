"""Which tensors are kept in blocks of formats that hold the same values, and these blocks.

    Q4_0    integers of 4 bits whose zero is 8
    Q5_0    integers of 4 bits with other zeros, which are subtracted: then they have 5 bits. Q4_1 has instead of the
            zero its product with the scale, which half precision holds for few scales.
    Q8_0    integers of 8 bits whose zero is 128, or 0 if they are signed
    MXFP4   floats of 4 bits with an exponent for 32
    FP8     F8_E4M3, in blocks of 128 inputs, or of 32 where rows or scales have no whole blocks of 128
    NVFP4   floats of 4 bits with a scale of F8_E4M3 for 16, in blocks of 256 inputs, or of 32

A block of inputs has one scale. So groups must be whole blocks in order. The scales of GGML's blocks are of half
precision, which must hold every scale; whether it does is checked before anything is written. Those of FP8 are F32:
what a publisher's tool multiplies by, so that code * scale in fp32 is the published value, whatever has a scale: a
block of rows and columns, a row, or a tensor. Blocks of NVFP4 have the F32 scale of the tensor. Scales for 16 are
multiplied by it; they are divided by its size where it is negative, since compressed-tensors divides, and the product
with the inverse is another number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from weightd.disk.read_ahead import ReadAhead
from weightd.disk.tensors import KEPT_VALUES, BlockScales, SourceTensor
from weightd.errors import CheckpointError
from weightd.importing.plan import ElementRun, runs_of
from weightd.importing.quantised.numbers import as_floats, of_blocks, unpacked, zero_points
from weightd_proto.encodings import BLOCK_FORMATS, E4M3_MAX, PACKED_E2M1, plain

Bytes = npt.NDArray[np.uint8]

NVFP4_VALUES, E2M1_MAX = 16, 6  # numbers that share a scale; the greatest
MXFP4 = "MXFP4"
FP8 = ("FP8_128", "FP8_32")  # the longest first
NVFP4 = ("NVFP4_256", "NVFP4_32")
INTEGERS = {4: "Q4_0", 8: "Q8_0"}  # by bits; the zero is the middle
WITH_ZEROS = {"Q4_0": "Q5_0"}  # which holds any zeros of four bits


def with_kept_formats(tensors: Mapping[str, SourceTensor]) -> tuple[dict[str, SourceTensor], list[str]]:
    """The tensors, with the formats in which they can be kept (BlockScales.kept), and why others cannot."""
    found, reasons = {}, dict[str, list[str]]()
    for name, tensor in tensors.items():
        scales = tensor.scales
        if scales is None:
            found[name] = tensor
            continue
        format, reason = _choice(tensor, scales)
        if reason:
            reasons.setdefault(reason, []).append(tensor.name)
        found[name] = replace(tensor, scales=replace(scales, kept=format))
    return found, [f"{_counted(names)} dequantised, because {reason}" for reason, names in reasons.items()]


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} matrices, first {names[0]}, are" if len(names) > 1 else f"{names[0]} is"


def _format(tensor: SourceTensor, scales: BlockScales) -> str:
    """Which would hold the numbers, or nothing."""
    if tensor.encoding == PACKED_E2M1:
        exponents = scales.tensor.encoding in (plain("U8"), plain("F8_E8M0"))
        if scales.tensor.encoding == plain("F8_E4M3") and (scales.rows, scales.columns) == (1, NVFP4_VALUES):
            return _longest(NVFP4, tensor.row_elements)
        return MXFP4 if exponents and (scales.rows, scales.columns) == (1, KEPT_VALUES) else ""
    if tensor.encoding == plain("F8_E4M3"):
        return _longest(FP8, tensor.row_elements, min(scales.columns, tensor.row_elements))
    bits = 8 if tensor.encoding == plain("I8") else tensor.packing.bits if tensor.packing is not None else 0
    return INTEGERS.get(bits, "")


def _longest(formats: Sequence[str], *sizes: int) -> str:
    """The first of the formats whose blocks divide all sizes, or the last."""
    return next((name for name in formats if all(n % BLOCK_FORMATS[name].values == 0 for n in sizes)), formats[-1])


def _choice(tensor: SourceTensor, scales: BlockScales) -> tuple[str, str]:
    """The format in which a tensor is kept, or why it cannot be."""
    format = _format(tensor, scales)
    if not format:
        return "", f"no kernel computes on {_kind(tensor)}"
    if format not in (*FP8, *NVFP4) and (scales.nested is not None or (scales.divisor, scales.multiplier) != (1, 1)):
        return "", "its scales are products or quotients, which half precision does not hold"
    if scales.groups:
        return "", "groups are in another order than inputs (desc_act, actorder)"
    inputs, size = (tensor.rows, scales.rows) if scales.transposed else (tensor.row_elements, scales.columns)
    if format in NVFP4:
        size = KEPT_VALUES  # a block has the scales of several groups
    if inputs % KEPT_VALUES or size % KEPT_VALUES:
        return "", f"groups of {size} of {inputs} inputs are not whole blocks of {KEPT_VALUES}"
    if format in (MXFP4, *FP8, *NVFP4):
        return format, ""
    middle = 0 if tensor.packing is None else 1 << (tensor.packing.bits - 1)
    least, greatest = _zeros_between(tensor, scales)
    if (least, greatest) != (middle, middle):
        format = WITH_ZEROS.get(format, "")
        if not format or least < 0 or greatest > 2 * middle:
            return "", f"no format has {2 * middle or 256} numbers and zeros of their own"
    return (format, "") if _fit_half(scales.tensor) else ("", "half precision does not hold its scales")


def _kind(tensor: SourceTensor) -> str:
    return "numbers of NVFP4" if tensor.encoding == PACKED_E2M1 else f"numbers of {tensor.encoding.format}"


def _zeros_between(tensor: SourceTensor, scales: BlockScales) -> tuple[float, float]:
    """The least and the greatest of the zeros."""
    zeros = scales.zeros
    if zeros is None:
        return scales.zero, scales.zero
    rows, groups = scales.tensor.rows, -(-tensor.row_elements // scales.columns)  # after them may be padding
    found = np.concatenate([zero_points(scales, zeros, data) for data in _whole(zeros)])[:rows, :groups]
    return float(found.min()), float(found.max())


def _fit_half(scales: SourceTensor) -> bool:
    """NaN and infinity do: they are refused when they are written. Exponents do not: most are beyond it."""
    if scales.dtype not in ("F32", "BF16"):
        return scales.dtype == "F16"
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
    if scales.kept in FP8:
        return _fp8_blocks(run, stored)
    if scales.kept in NVFP4:
        return _nvfp4_blocks(run, stored)
    width, data = run.tensor.row_elements, np.frombuffer(stored[0], np.uint8)
    codes = data.view(np.uint8) if run.tensor.packing is None else unpacked(run.tensor.packing, data, width)
    factors, zeros = of_blocks(run, stored)
    if scales.transposed:
        by_block = codes.reshape(-1, KEPT_VALUES, width).swapaxes(1, 2)
    else:
        by_block = codes.reshape(len(factors), -1, KEPT_VALUES)
    of_block = _for_blocks(scales, factors, by_block.shape[1])
    if scales.kept == "Q8_0":
        signed = by_block if run.tensor.packing is None else by_block ^ np.uint8(128)
        return _blocks(scales.kept, of_block, signed)
    if scales.kept == "Q4_0":
        return _blocks(scales.kept, of_block, _halves(by_block))
    assert zeros is not None or scales.zero
    subtracted = np.float32(scales.zero) if zeros is None else _for_blocks(scales, zeros, by_block.shape[1])[..., None]
    fives = (by_block - subtracted + 16).astype(np.uint8)
    fifth = np.packbits(fives >> np.uint8(4), axis=-1, bitorder="little")
    return _blocks(scales.kept, of_block, np.concatenate([fifth, _halves(fives & np.uint8(15))], axis=-1))


def _for_blocks(scales: BlockScales, of_groups: npt.NDArray[np.float32], blocks: int) -> npt.NDArray[np.float32]:
    """What is given for groups, for the blocks of which they consist: [rows, blocks]."""
    if scales.transposed:
        return of_groups[::KEPT_VALUES]
    return np.repeat(of_groups, scales.columns // KEPT_VALUES, axis=1)[:, :blocks]


def _halves(codes: Bytes) -> Bytes:
    """Numbers of four bits: those of the first half of a block in the lower halves of bytes."""
    return codes[..., : KEPT_VALUES // 2] | codes[..., KEPT_VALUES // 2 :] << np.uint8(4)


def _blocks(format: str, factors: npt.NDArray[np.float32], codes: Bytes) -> Bytes:
    """`factors`: [rows, blocks], `codes`: [rows, blocks, bytes]."""
    blocks = np.empty((*factors.shape, BLOCK_FORMATS[format].bytes), np.uint8)
    halves = np.ascontiguousarray(factors.astype("<f2"))
    blocks[..., :2] = halves.view(np.uint8).reshape(*factors.shape, 2)
    blocks[..., 2:] = codes
    return blocks.reshape(-1)


def _mxfp4_blocks(stored: Sequence[memoryview]) -> Bytes:
    """Rows of PACKED_E2M1 with an exponent for 32 values. `stored`: values and exponents."""
    codes = _codes_of_pairs(stored[0])
    blocks = np.empty((len(codes), BLOCK_FORMATS[MXFP4].bytes), np.uint8)
    blocks[:, 0] = np.frombuffer(stored[1], np.uint8)
    blocks[:, 1:] = codes
    return blocks.reshape(-1)


def _codes_of_pairs(stored: memoryview) -> Bytes:
    """Those of each block of 32, of which half are in the lower halves of bytes: [blocks, 16]."""
    pairs = np.frombuffer(stored, np.uint8).reshape(-1, KEPT_VALUES // 2)
    codes = np.empty((len(pairs), KEPT_VALUES), np.uint8)
    codes[:, 0::2], codes[:, 1::2] = pairs & 15, pairs >> 4
    return _halves(codes)


def _nvfp4_blocks(run: ElementRun, stored: Sequence[memoryview]) -> Bytes:
    """CheckpointError for a scale that stands for no number, and for one with which a number would be infinite."""
    scales = run.tensor.scales
    assert scales is not None
    values = BLOCK_FORMATS[scales.kept].values
    of_groups = np.frombuffer(stored[1], np.uint8).reshape(-1, values // NVFP4_VALUES)
    with np.errstate(over="ignore"):
        _require_finite(scales, of_blocks(run, stored)[0], E2M1_MAX)
    whole = scales.multiplier if scales.divisor == 1 else -scales.divisor
    blocks = np.empty((len(of_groups), BLOCK_FORMATS[scales.kept].bytes), np.uint8)
    blocks[:, :4] = np.array([whole], "<f4").view(np.uint8)
    blocks[:, 4 : 4 + of_groups.shape[1]] = of_groups
    blocks[:, 4 + of_groups.shape[1] :] = _codes_of_pairs(stored[0]).reshape(len(of_groups), -1)
    return blocks.reshape(-1)


def _require_finite(scales: BlockScales, factors: npt.NDArray[np.float32], greatest: float) -> None:
    """CheckpointError where the greatest number times a scale is infinite."""
    with np.errstate(over="ignore"):
        large = ~np.isfinite(factors * np.float32(greatest))
    if large.any():
        raise CheckpointError(
            f"{scales.tensor.name} in {scales.tensor.path} has a scale of {factors[large][0]:.3g}, whose products are "
            "infinite: download the file again"
        )


def _fp8_blocks(run: ElementRun, stored: Sequence[memoryview]) -> Bytes:
    """CheckpointError for a code that stands for no number, and for a scale with which one would be infinite."""
    scales, width = run.tensor.scales, run.tensor.row_elements
    assert scales is not None
    values = BLOCK_FORMATS[scales.kept].values
    codes = np.frombuffer(stored[0], np.uint8).reshape(-1, width)
    wrong = codes & 0x7F == 0x7F
    if wrong.any():
        row, column = divmod(int(np.argmax(wrong)), width)
        raise CheckpointError(
            f"{run.tensor.name} in {run.tensor.path} has a NaN in row {run.first_row + row}, column {column}: "
            "download the file again"
        )
    factors, _ = of_blocks(run, stored)
    _require_finite(scales, factors, E4M3_MAX)
    spread = factors[:, np.arange(0, width, values) // scales.columns]
    blocks = np.empty((*spread.shape, BLOCK_FORMATS[scales.kept].bytes), np.uint8)
    blocks[..., :4] = np.ascontiguousarray(spread, "<f4").view(np.uint8).reshape(*spread.shape, 4)
    blocks[..., 4:] = codes.reshape(*spread.shape, values)
    return blocks.reshape(-1)
