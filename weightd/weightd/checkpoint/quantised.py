"""Published quantised formats: tensors of values, and the tensors that hold their scales.

Both become one tensor (SourceTensor.scales), which the import dequantises while it reads, bit for bit as transformers
does (integrations/mxfp4.py, integrations/finegrained_fp8.py):

    mxfp4   NAME_blocks [..., blocks, bytes] with two E2M1 numbers in a byte, NAME_scales [..., blocks] with exponents.
            (gpt-oss)
    fp8     NAME of F8_E4M3, or of I8 with two E2M1 numbers in a byte; one scale for each block of rows and columns, for
            each row, or for all. Scales are floats or exponents. (DeepSeek-V3)

Scales of activations are for processors that multiply numbers of 8 bits. They are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from weightd.disk.tensors import BlockScales, SourceTensor
from weightd.errors import CheckpointError
from weightd_proto.encodings import PACKED_E2M1, plain

Tensors = Mapping[str, SourceTensor]

CONFIG = "quantization_config"
EXPERTS = ("gate_up_proj", "down_proj")
BLOCKS, BLOCK_SCALES = "_blocks", "_scales"
# Names of the scales of NAME.weight or NAME, as different publishers spell them.
SCALE_NAMES = ("{name}_scale_inv", "{name}_scale", "{module}.scale", "{module}.qscale_weight")
ACTIVATION_SCALES = re.compile(r".*[._](activation_scale|input_scale|qscale_act)")
FLOATS = ("F8_E4M3", "F8_E5M2")
PACKED = ("I8", "U8")
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def quantisation(path: Path, config: Mapping[str, Any]) -> str | None:
    """The format of a quantised checkpoint, one of FORMATS; None: it is not quantised.

    CheckpointError for a format that weightd does not read.
    """
    for key in (CONFIG, "compression_config"):
        value = config.get(key)
        if value is None:
            continue
        method = value.get("quant_method") if isinstance(value, dict) else None
        if key == CONFIG and method in FORMATS:
            return str(method)
        raise CheckpointError(
            f"{path} is quantised ({method or f'{key} = {value!r}'}): import the unquantised checkpoint, one in "
            f"{' or '.join(FORMATS)}, or a .gguf file"
        )
    return None


def with_scales(path: Path, config: Mapping[str, Any], tensors: Tensors) -> dict[str, SourceTensor]:
    """The tensors of a checkpoint, quantised ones with their scales. CheckpointError names one whose scales do not fit.

    They are dequantised to the dtype of the configuration, where an import keeps dtypes, or to BF16.
    """
    method = quantisation(path, config)
    if method is None:
        return dict(tensors)
    text = config.get("text_config")
    values = (part.get(key) for part in (config, text) if isinstance(part, dict) for key in ("dtype", "torch_dtype"))
    dtype = next((DTYPES[value] for value in values if value in DTYPES), "BF16")
    block = config[CONFIG].get("weight_block_size")
    return dict(FORMATS[method](tensors, dtype, block))


def _mxfp4(tensors: Tensors, dtype: str, _: Any) -> Iterator[tuple[str, SourceTensor]]:
    for name, tensor in tensors.items():
        base = name.removesuffix(BLOCKS)
        if base != name:
            scales = tensors.get(base + BLOCK_SCALES)
            if scales is None or tensor.dtype != "U8" or scales.dtype != "U8" or scales.shape != tensor.shape[:-1]:
                raise CheckpointError(f"{name} has no {base + BLOCK_SCALES} that fits it in {tensor.path}")
            *rows, blocks, block_bytes = tensor.shape
            columns = block_bytes * PACKED_E2M1.block_values
            whole = replace(tensor, shape=(*rows, blocks * columns), encoding=PACKED_E2M1)
            yield base, _scaled(whole, scales, dtype, (1, columns))
        elif len(tensor.shape) == 3 and name.endswith(EXPERTS):  # else it would be transposed, as the others are
            raise CheckpointError(
                f"{name} is {tensor.dtype} in {tensor.path}, but {CONFIG} says that experts are mxfp4: correct it"
            )
        elif not (name.endswith(BLOCK_SCALES) and name.removesuffix(BLOCK_SCALES) + BLOCKS in tensors):
            yield name, tensor


def _fp8(tensors: Tensors, dtype: str, block: Any) -> Iterator[tuple[str, SourceTensor]]:
    scales = {name: found for name, tensor in tensors.items() if (found := _scales_of(name, tensor, tensors))}
    used = set(scales.values())
    for name, tensor in tensors.items():
        if name in scales:
            packed = tensor.dtype in PACKED
            *rows, width = tensor.shape
            whole = replace(tensor, shape=(*rows, 2 * width), encoding=PACKED_E2M1) if packed else tensor
            yield name, _scaled(whole, tensors[scales[name]], dtype, block)
        elif tensor.dtype in FLOATS:
            raise CheckpointError(f"{name} is {tensor.dtype} in {tensor.path}, which has no scales for it")
        elif name not in used and not ACTIVATION_SCALES.fullmatch(name):
            yield name, tensor


def _scales_of(name: str, tensor: SourceTensor, tensors: Tensors) -> str | None:
    if tensor.dtype not in (*FLOATS, *PACKED) or len(tensor.shape) < 2:
        return None
    names = (form.format(name=name, module=name.removesuffix(".weight")) for form in SCALE_NAMES)
    return next((found for found in names if found in tensors), None)


FORMATS: dict[str, Callable[[Tensors, str, Any], Iterator[tuple[str, SourceTensor]]]] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
}


def _scaled(tensor: SourceTensor, scales: SourceTensor, dtype: str, block: Any) -> SourceTensor:
    """`block`: its rows and columns by the configuration, or None: then the numbers of values and scales decide."""
    *matrices, rows, width = tensor.shape
    shape = scales.shape
    if prod(shape) == 1:
        shape = (1,) * len(tensor.shape)
    elif shape == tensor.shape[:-1]:
        shape = (*shape, 1)
    sizes = block if isinstance(block, list | tuple) and len(block) == 2 else (None, None)
    found = [_block_size(*of) for of in zip((rows, width), shape[-2:], sizes, strict=False)]
    exponents = scales.encoding in (plain("U8"), plain("F8_E8M0"))
    if list(shape[:-2]) != matrices or None in found or not (exponents or scales.dtype in DTYPES.values()):
        raise CheckpointError(
            f"{scales.name} has shape {list(scales.shape)} of {scales.dtype} in {scales.path}, which are no scales of "
            f"{tensor.name} {list(tensor.shape)}"
        )
    return replace(tensor, scales=BlockScales(replace(scales, shape=shape), found[0] or 1, found[1] or 1, rows, dtype))


def _block_size(values: int, scales: int, configured: Any) -> int | None:
    """How many values have one scale, in one dimension. The last block may be shorter."""
    if type(configured) is int and configured > 0 and -(-values // configured) == scales:
        return configured
    return values // scales if scales and values and values % scales == 0 else None
