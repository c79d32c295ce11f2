"""The matrices of a quantised checkpoint of which there is only the configuration, as formats.py would read them.

Its quantization_config says how numbers and scales are stored. Which matrices have them only the files say. Expected
are all of linear layers, without those that the configuration leaves out. A head is expected to have none, except in
compressed-tensors, whose lists are complete. Experts alone have them in mxfp4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from weightd.checkpoint.quantisation.formats import CONFIG, FORMATS
from weightd.checkpoint.quantisation.integers import packing
from weightd.checkpoint.quantisation.scales import QuantisedTensors
from weightd.disk.tensors import BlockScales, SourceTensor
from weightd_proto.encodings import PACKED_E2M1, plain
from weightd_proto.weightd_pb2 import Encoding

LEFT_OUT = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules", "llm_int8_skip_modules")
COMPRESSED = "compressed-tensors"
HEAD = "lm_head"
BLOCK, NVFP4_GROUP, MX_GROUP = 128, 16, 32  # inputs that share a scale
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Numbers:
    """How the numbers of a matrix [..., outputs, inputs] are stored.

    Attributes:
        encoding: of floats, or of integers of 8 bits.
        bits: of integers in words; 0 for others.
        group: inputs that share a scale; None: all.
        scales: their dtype. Half precision is expected to hold those of integers.
        symmetric: all zeros are in the middle.
        divisor: of all scales.
        ordered: groups have consecutive inputs.
    """

    encoding: Encoding
    bits: int = 0
    group: int | None = None
    scales: str = "F16"
    symmetric: bool = True
    divisor: float = 1.0
    ordered: bool = True

    def of(self, name: str, shape: tuple[int, ...], dtype: str, path: Path) -> SourceTensor:
        """A tensor of them."""
        *outputs, inputs = shape
        group = min(self.group or inputs, inputs)
        scales = SourceTensor(f"{name}_scale", (*outputs, -(-inputs // group)), plain(self.scales), path, 0)
        zero = (1 << self.bits >> 1) - (not self.symmetric)
        groups = b"" if self.ordered else b"\0"
        found = BlockScales(scales, 1, group, outputs[-1], dtype, zero=zero, groups=groups, divisor=self.divisor)
        tensor = SourceTensor(name, shape, self.encoding, path, 0, scales=found)
        return replace(tensor, packing=packing(self.bits)) if self.bits else tensor


FP8 = Numbers(plain("F8_E4M3"), scales="F32")
NVFP4 = Numbers(PACKED_E2M1, group=NVFP4_GROUP, scales="F8_E4M3")
MXFP4 = Numbers(PACKED_E2M1, group=MX_GROUP, scales="U8")


def in_words(bits: int, group: Any, symmetric: bool, ordered: bool) -> Numbers:
    """Integers of GPTQ, AWQ and compressed-tensors. `group`: -1 for all inputs."""
    size = group if type(group) is int and group > 0 else None
    encoding = Encoding(format=f"U{bits} in words", block_values=32 // bits, block_bytes=4)
    return Numbers(encoding, bits, size, symmetric=symmetric, ordered=ordered or size is None)


def expected(
    path: Path, config: Mapping[str, Any], matrices: Mapping[str, tuple[int, ...]], experts: Iterable[str], dtype: str
) -> dict[str, SourceTensor]:
    """Those of `matrices` that are expected to be quantised.

    Args:
        matrices: shapes [..., outputs, inputs] of the weights of linear layers, by name.
        experts: the names of those that are experts'.
        dtype: to which they are dequantised where they are not kept.

    CheckpointError for settings that an import refuses.
    """
    settings, of_experts = config[CONFIG], set(experts)
    method = settings["quant_method"]
    list(FORMATS[method](QuantisedTensors(path, {}, settings, dtype)))
    found = {}
    for name, shape in matrices.items():
        module = name.removesuffix(".weight")
        left_out = any(_names(entry, module) for key in LEFT_OUT for entry in _list(settings.get(key)))
        head = module.rpartition(".")[2] == HEAD and method != COMPRESSED and settings.get(HEAD) is not True
        numbers = None if left_out or head else METHODS[method](settings, module)
        if numbers is not None and (method != "mxfp4" or name in of_experts):
            found[name] = numbers.of(name, shape, dtype, path)
    return found


def _list(value: Any) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _names(entry: str, module: str) -> bool:
    """Whether an entry of a list means a module: a part of its path, a pattern of shells, or after re: an expression"""
    if entry.startswith("re:"):
        try:
            return re.match(entry.removeprefix("re:"), module) is not None
        except re.error:
            return False
    if "*" in entry:
        return fnmatchcase(module, entry) or fnmatchcase(module, f"{entry}.*")
    return f".{entry}." in f".{module}."


def _fp8(settings: Settings, _: str) -> Numbers:
    return replace(FP8, group=_columns(settings.get("weight_block_size")))


def _columns(block: Any) -> int | None:
    """Of a block [rows, columns]; None: it is none."""
    known = isinstance(block, list) and len(block) == 2 and type(block[1]) is int and block[1] > 0
    return block[1] if known else None


def _gptq(settings: Settings, module: str) -> Numbers | None:
    dynamic = settings.get("dynamic")
    excluded = [key.removeprefix("-:") for key in dynamic if key.startswith("-:")] if isinstance(dynamic, dict) else []
    if any(_names(f"re:{entry}", module) for entry in excluded):
        return None
    blocks = settings.get("modules_in_block_to_quantize")
    inside = [one for part in blocks for one in _list(part)] if isinstance(blocks, list) else []
    if inside and not any(_names(entry, module) for entry in inside):
        return None
    symmetric, ordered = settings.get("sym") is not False, not settings.get("desc_act")
    return in_words(_bits(settings.get("bits")), settings.get("group_size"), symmetric, ordered)


def _awq(settings: Settings, _: str) -> Numbers:
    group = settings.get("group_size", settings.get("q_group_size"))
    return in_words(4, group, settings.get("zero_point") is False, True)


def _auto_round(settings: Settings, module: str) -> Numbers | None:
    """The settings of a module are in `extra_config`, where they are not those of all."""
    of_modules = settings.get("extra_config")
    own = of_modules.get(module) if isinstance(of_modules, dict) else None
    said = {**settings, **own} if isinstance(own, dict) else settings
    if said.get("bits") in (16, 32):
        return None
    return in_words(_bits(said.get("bits")), said.get("group_size"), said.get("sym") is not False, True)


def _bits(value: Any) -> int:
    return value if value in (4, 8) else 4


def _compressed(settings: Settings, module: str) -> Numbers | None:
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        if any(target == "Linear" or _names(target, module) for target in _list(group.get("targets"))):
            return _of_group(group.get("format") or settings.get("format"), weights)
    return None


def _of_group(form: Any, weights: Settings) -> Numbers:
    if weights.get("type") == "float":
        eight = replace(FP8, group=_columns(weights.get("block_structure")))
        mx = replace(FP8, group=MX_GROUP, scales="U8")
        return {"nvfp4-pack-quantized": NVFP4, "mxfp4-pack-quantized": MXFP4, "mxfp8-quantized": mx}.get(form, eight)
    bits, symmetric = _bits(weights.get("num_bits")), weights.get("symmetric") is not False
    if form == "int-quantized":
        return replace(in_words(8, weights.get("group_size"), symmetric, True), encoding=plain("I8"), bits=0)
    return in_words(bits, weights.get("group_size"), symmetric, weights.get("actorder") not in ("group", True))


def _modelopt(settings: Settings, module: str) -> Numbers | None:
    said = settings.get("quantization", settings)
    if not isinstance(said, dict) or any(_names(entry, module) for key in LEFT_OUT for entry in _list(said.get(key))):
        return None
    algorithm, layers = said.get("quant_algo"), said.get("quantized_layers")
    if algorithm == "MIXED_PRECISION" and isinstance(layers, dict):
        own = next((of for name, of in layers.items() if isinstance(of, dict) and _names(name, module)), None)
        algorithm = None if own is None else own.get("quant_algo")
    if not isinstance(algorithm, str):
        return None
    if "NVFP4" in algorithm:
        return NVFP4
    return replace(FP8, group=BLOCK) if algorithm.startswith("FP8_PB") else FP8


def _bits_and_bytes(settings: Settings, _: str) -> Numbers:
    four = bool(settings.get("load_in_4bit"))
    return Numbers(Encoding(format="NF4", block_values=2, block_bytes=1)) if four else Numbers(plain("I8"), divisor=127)


METHODS: dict[str, Callable[[Settings, str], Numbers | None]] = {
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    COMPRESSED: _compressed,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "mxfp4": lambda *_: MXFP4,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "bitsandbytes": _bits_and_bytes,
}
