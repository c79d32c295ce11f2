"""The formats in which checkpoints are published quantised, by their quantization_config.

Their tensors get scales and zeros (SourceTensor.scales). The import dequantises them while it reads, to what their
publishers' tools compute, or keeps their numbers where a format of its own holds the same.

What is quantised is what has scales, whatever lists the configuration has (ignore, targets, modules_to_not_convert,
modules_in_block_to_quantize). Scales of activations, keys and values are for processors that multiply numbers of 8
bits. They are left out, and a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from weightd.checkpoint.quantisation.bits_and_bytes import bits_and_bytes
from weightd.checkpoint.quantisation.floats import fp8, mxfp4, with_scales
from weightd.checkpoint.quantisation.integers import auto_round, awq, gptq, packed_integers, with_zeros
from weightd.checkpoint.quantisation.scales import QuantisedTensors
from weightd.disk.tensors import SourceTensor
from weightd.errors import CheckpointError

CONFIG = "quantization_config"
# Files with the quantization_config of older checkpoints, by its method.
CONFIG_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
LEFT_OUT = {
    "keys and values": re.compile(r".*\.([qkv]_scale|kv_scale|prob_output_scale|[qkv]_zero_point|output_scale)"),
    "activations": re.compile(
        r".*[._](activation_scale|input_scale|input_zero_point|input_global_scale|qscale_act|output_zero_point)"
    ),
}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
CT_PACKED, CT_WEIGHT, CT_SCALE = ".weight_packed", ".weight", ".weight_scale"
CT_SIDES = (CT_SCALE, ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale")
CT_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized"),
    *("mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense"),
)
MLX = "mlx"  # whose config.json has a key of its own
# Of tensors in quantised checkpoints of these and other formats: exl2 has q_weight, exl3 trellis.
QUANTISED_ENDS = (
    *(".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".SCB"),
    *(".absmax", ".q_weight", ".trellis"),
)
MODELOPT = (
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_PB_WO",
    "FP8_PB_REAL",
    "NVFP4",
    "NVFP4_AWQ",
    "W4A16_NVFP4",
    "MIXED_PRECISION",
)


def quantisation(path: Path, config: Mapping[str, Any]) -> str | None:
    """The format of a quantised checkpoint, one of FORMATS; None: it is not quantised.

    CheckpointError for a format that weightd does not read.
    """
    of_mlx = config.get("quantization")
    if isinstance(of_mlx, dict) and "group_size" in of_mlx:
        raise CheckpointError(f"{path} is quantised ({MLX}): {_instead()}")
    for key in (CONFIG, "compression_config"):
        value = config.get(key)
        if value is None:
            continue
        method = value.get("quant_method") if isinstance(value, dict) else None
        if key == CONFIG and isinstance(method, str) and method in FORMATS:
            return method
        raise CheckpointError(f"{path} is quantised ({method or f'{key} = {value!r}'}): {_instead()}")
    return None


def _instead() -> str:
    *others, last = FORMATS
    return f"import the unquantised checkpoint, one in {', '.join(others)} or {last}, or a .gguf file"


def dequantisable(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, SourceTensor]
) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """The tensors of a checkpoint, quantised ones with their scales, and what a user should know.

    They are dequantised to the dtype of the configuration, where an import keeps dtypes, or to BF16. CheckpointError
    names one whose scales do not fit.
    """
    method = quantisation(path, config)
    if method is None:
        _check_unquantised(path, tensors)
        return dict(tensors), ()
    text = config.get("text_config")
    values = (part.get(key) for part in (config, text) if isinstance(part, dict) for key in ("dtype", "torch_dtype"))
    dtype = next((DTYPES[value] for value in values if isinstance(value, str) and value in DTYPES), "BF16")
    notes: list[str] = []
    weights = dict(tensors)
    for of, pattern in LEFT_OUT.items():
        names = [name for name in weights if pattern.fullmatch(name)]
        if names:
            count = f"{len(names)} scale{'s' * (len(names) > 1)}"
            notes.append(f"{count} of {of} left out, which are not quantised here; first {names[0]}")
        weights = {name: tensor for name, tensor in weights.items() if name not in set(names)}
    q = QuantisedTensors(path, weights, config[CONFIG], dtype, notes)
    return dict(FORMATS[method](q)), tuple(notes)


def _check_unquantised(path: Path, tensors: Mapping[str, SourceTensor]) -> None:
    """CheckpointError for tensors of a quantised checkpoint, whose configuration does not say that it is one."""
    found = next((name for name in tensors if name.endswith(QUANTISED_ENDS)), None)
    if found is not None:
        raise CheckpointError(
            f"{path} holds {found}, as quantised checkpoints do, but its config.json has no {CONFIG}, which says how: "
            f"download it again, or {_instead()}"
        )


def _compressed(q: QuantisedTensors) -> Iterator[tuple[str, SourceTensor]]:
    """compressed-tensors: each module says by its tensors how it is stored."""
    _check_compressed(q)
    settings = dict(q.settings) | {"weight_block_size": _block_structure(q.settings)}
    q = QuantisedTensors(q.path, q.tensors, settings, q.dtype, q.notes)
    for name, tensor in q.tensors.items():
        module = name.removesuffix(CT_PACKED)
        if module != name:
            scales = q.need(module + CT_SCALE, tensor)
            four = tensor.dtype == "U8"
            whole = with_scales(q, f"{module}.weight", tensor, scales) if four else packed_integers(q, module, tensor)
            yield module + CT_WEIGHT, whole
            continue
        of = next((name.removesuffix(side) for side in CT_SIDES if name.endswith(side)), None)
        if of is not None and (of + CT_PACKED in q.tensors or of + CT_WEIGHT in q.tensors):
            continue
        module = name.removesuffix(CT_WEIGHT)
        if tensor.dtype == "I8" and module != name and len(tensor.shape) == 2:
            yield name, with_zeros(q, module, tensor, 0)
        elif tensor.dtype.startswith("F8") and module != name:
            yield name, with_scales(q, name, tensor, q.need(module + CT_SCALE, tensor))
        elif module != name and module + CT_SCALE in q.tensors:
            raise CheckpointError(
                f"{name} is {tensor.dtype} in {tensor.path}, but has scales: save the checkpoint compressed"
            )
        else:
            yield name, tensor


def _check_compressed(q: QuantisedTensors) -> None:
    for form in (q.settings.get("format"), *(group.get("format") for group in _groups(q.settings))):
        if form is not None and form not in CT_FORMATS:
            raise CheckpointError(
                f"{q.path} is compressed-tensors of format {form!r}, read are {', '.join(CT_FORMATS)}: import one of "
                "them, or the unquantised checkpoint"
            )
    sparsity = q.settings.get("sparsity_config")
    form = sparsity.get("format") if isinstance(sparsity, dict) else None
    if form not in (None, "dense"):
        raise CheckpointError(
            f"{q.path} leaves out zeros (sparsity_config of format {form!r}), which is not read: import a checkpoint "
            "that is only quantised"
        )
    if q.settings.get("transform_config"):
        raise CheckpointError(
            f"{q.path} rotates activations (transform_config), which is not read: import a checkpoint without it"
        )


def _block_structure(settings: Mapping[str, Any]) -> Any:
    """The rows and columns of blocks, if all groups that have some agree."""
    found = [
        weights.get("block_structure")
        for group in _groups(settings)
        if isinstance(weights := group.get("weights"), dict)
    ]
    found = [each for each in found if isinstance(each, list)]
    return found[0] if found and all(each == found[0] for each in found) else None


def _groups(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = settings.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _modelopt(q: QuantisedTensors) -> Iterator[tuple[str, SourceTensor]]:
    settings = q.settings.get("quantization", q.settings)  # of hf_quant_config.json
    algorithm = settings.get("quant_algo") if isinstance(settings, dict) else None
    if algorithm not in MODELOPT:
        raise CheckpointError(
            f"{q.path} is modelopt's {algorithm!r}, read are FP8 and NVFP4: import one of them, or the unquantised "
            "checkpoint"
        )
    scaled_inputs = next((name for name in q.tensors if name.endswith("pre_quant_scale")), None)
    if scaled_inputs is not None:
        raise CheckpointError(
            f"{q.path} scales inputs before it rounds them ({scaled_inputs}), which is not read: import modelopt's FP8 "
            "or NVFP4 without AWQ"
        )
    yield from fp8(q)


FORMATS: dict[str, Callable[[QuantisedTensors], Iterator[tuple[str, SourceTensor]]]] = {
    "gptq": gptq,
    "awq": awq,
    "auto-round": auto_round,
    "compressed-tensors": _compressed,
    "fp8": fp8,
    "fbgemm_fp8": fp8,
    "mxfp4": mxfp4,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "bitsandbytes": bits_and_bytes,
}
