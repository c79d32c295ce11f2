"""Floats of 4 and 8 bits with scales: mxfp4, fp8, and NVFP4 of two publishers.

    mxfp4   NAME_blocks [..., blocks, bytes] with two E2M1 numbers in a byte, NAME_scales [..., blocks] with exponents.
            (gpt-oss)
    fp8     NAME of F8_E4M3, or of I8 with two E2M1 numbers in a byte; one scale for each block of rows and columns, for
            each row, or for all. Scales are floats or exponents. (DeepSeek-V3, modelopt, compressed-tensors)
    nvfp4   NAME of U8 with two E2M1 numbers in a byte, a scale of F8_E4M3 for 16 of them, and one of F32 for all, by
            which modelopt multiplies (weight_scale_2) and compressed-tensors divides (weight_global_scale).

All are dequantised as transformers and compressed-tensors do (integrations/mxfp4.py, finegrained_fp8.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import isfinite

from weightd.checkpoint.quantisation.scales import FLOATS, QuantisedTensors, misfit, scaled, small_values
from weightd.disk.tensors import BlockScales, SourceTensor
from weightd.errors import CheckpointError
from weightd_proto.encodings import PACKED_E2M1, plain

Named = Iterator[tuple[str, SourceTensor]]

EXPERTS = ("gate_up_proj", "down_proj")
BLOCKS, BLOCK_SCALES = "_blocks", "_scales"
# Names of the scales of NAME.weight or NAME, as different publishers spell them.
SCALE_NAMES = ("{name}_scale_inv", "{name}_scale", "{module}.scale", "{module}.qscale_weight")
WHOLE_SCALE_NAMES = ("{name}_scale_2", "{name}_global_scale")
PACKED = ("I8", "U8")


def mxfp4(q: QuantisedTensors) -> Named:
    tensors = q.tensors
    for name, tensor in tensors.items():
        module = name.removesuffix(BLOCKS)
        if module != name:
            scales = tensors.get(module + BLOCK_SCALES)
            known = scales is not None and tensor.dtype == scales.dtype == "U8" and len(tensor.shape) > 2
            if scales is None or not known or scales.shape != tensor.shape[:-1]:
                raise CheckpointError(f"{name} has no {module + BLOCK_SCALES} that fits it in {tensor.path}")
            *rows, blocks, block_bytes = tensor.shape
            columns = block_bytes * PACKED_E2M1.block_values
            whole = replace(tensor, shape=(*rows, blocks * columns), encoding=PACKED_E2M1)
            yield module, scaled(whole, scales, q.dtype, (1, columns))
        elif len(tensor.shape) == 3 and name.endswith(EXPERTS):  # else it would be transposed, as the others are
            raise CheckpointError(
                f"{name} is {tensor.dtype} in {tensor.path}, but its configuration says that experts are mxfp4: "
                "correct it"
            )
        elif not (name.endswith(BLOCK_SCALES) and name.removesuffix(BLOCK_SCALES) + BLOCKS in tensors):
            yield name, tensor


def fp8(q: QuantisedTensors) -> Named:
    """Also of NVFP4, where numbers of 4 bits have scales of 8."""
    scales = {name: found for name, tensor in q.tensors.items() if (found := _scales_of(name, tensor, q))}
    used = {side for name, found in scales.items() for side in (found, _whole_scale_of(name, q))}
    for name, tensor in q.tensors.items():
        if name in scales:
            yield name, with_scales(q, name, tensor, q.tensors[scales[name]])
        elif tensor.dtype in FLOATS and name not in used:
            raise CheckpointError(f"{name} is {tensor.dtype} in {tensor.path}, which has no scales for it")
        elif name not in used:
            yield name, tensor


def with_scales(q: QuantisedTensors, name: str, tensor: SourceTensor, scales: SourceTensor) -> SourceTensor:
    """A tensor of floats of 4 or 8 bits. Of 4, if its dtype is one of PACKED."""
    if not tensor.shape:
        raise misfit(scales, tensor)
    *rows, width = tensor.shape
    four = tensor.dtype in PACKED
    whole = replace(tensor, shape=(*rows, 2 * width), encoding=PACKED_E2M1) if four else tensor
    side = _whole_scale_of(name, q)
    found = scaled(whole, _squeezed(scales), q.dtype, q.settings.get("weight_block_size"), side is not None)
    assert found.scales is not None
    return replace(found, scales=_with_factor(q, found.scales, side))


def _with_factor(q: QuantisedTensors, scales: BlockScales, side: str | None) -> BlockScales:
    """`side`: the name of the scale of the whole tensor."""
    if side is None:
        return scales
    tensor = q.tensors[side]
    value = float(small_values(tensor)[0]) if tensor.encoding == plain("F32") and tensor.elements == 1 else 0.0
    if not isfinite(value) or value <= 0:
        raise CheckpointError(f"{side} in {tensor.path} is not one positive number of F32: download the file again")
    divides = side.endswith(WHOLE_SCALE_NAMES[1].format(name=""))
    return replace(scales, divisor=value) if divides else replace(scales, multiplier=value)


def _squeezed(scales: SourceTensor) -> SourceTensor:
    """modelopt writes scales of blocks of a matrix as [rows, 1, columns, 1]."""
    if len(scales.shape) == 4 and scales.shape[1] == scales.shape[3] == 1:
        return replace(scales, shape=scales.shape[::2])
    return scales


def _scales_of(name: str, tensor: SourceTensor, q: QuantisedTensors) -> str | None:
    if tensor.dtype not in (*FLOATS, *PACKED) or len(tensor.shape) < 2:
        return None
    return _first_of(SCALE_NAMES, name, q)


def _whole_scale_of(name: str, q: QuantisedTensors) -> str | None:
    return _first_of(WHOLE_SCALE_NAMES, name, q)


def _first_of(forms: tuple[str, ...], name: str, q: QuantisedTensors) -> str | None:
    names = (form.format(name=name, module=name.removesuffix(".weight")) for form in forms)
    return next((found for found in names if found in q.tensors), None)
