"""Integers of 4 and 8 bits in words of 32: GPTQ, AWQ and compressed-tensors' pack-quantized.

The names and shapes, of a module with as many inputs and outputs, in words of n numbers:

    gptq      NAME.qweight [inputs / n, outputs], NAME.qzeros [groups, outputs / n], NAME.scales [groups, outputs]. A
              word of qweight holds numbers of consecutive inputs. Zeros are stored less one, except in
              checkpoint_format gptq_v2. NAME.g_idx, if it is there, names the group of each input (desc_act).
    awq gemm  NAME.qweight [inputs, outputs / 8], NAME.qzeros [groups, outputs / 8], NAME.scales [groups, outputs]. The
              numbers of a word are outputs 0, 2, 4, 6, 1, 3, 5, 7.
    awq gemv  NAME.qweight [outputs, inputs / 8], NAME.qzeros [outputs, words], NAME.scales [outputs, 8 words], in
              order, with padding after the groups.
    packed    NAME.weight_packed [outputs, inputs / n], NAME.weight_scale [outputs, groups], NAME.weight_shape;
              NAME.weight_zero_point [outputs / n, groups] in words of consecutive outputs, or [outputs, groups] of I8.
              NAME.weight_g_idx as g_idx. Numbers and zeros have 2 ** (bits - 1) added to them.

Tensors with rows of inputs keep the name of qweight, so that the recipe transposes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from weightd.checkpoint.quantisation.scales import (
    BITS,
    FLOAT_DTYPES,
    QuantisedTensors,
    as_matrix,
    block_size,
    group_order,
    is_words,
    misfit,
    packed,
    scaled,
    small_values,
)
from weightd.disk.tensors import BlockScales, Packing, SourceTensor
from weightd.errors import CheckpointError
from weightd_proto.encodings import plain

Named = Iterator[tuple[str, SourceTensor]]

WORDS, ZEROS, SCALES, GROUPS = ".qweight", ".qzeros", ".scales", ".g_idx"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 0}  # by what must be added to zeros
AWQ_VERSIONS = ("gemm", "gemv", "exllama", "ipex")  # the last two run what gemm stores
GEMV = "gemv"
# What auto-round writes, by its packing_format: the method, and what its settings would say.
AUTO_ROUND: dict[str, tuple[str, dict[str, Any]]] = {
    "auto_round:auto_gptq": ("gptq", {"checkpoint_format": "gptq"}),
    "auto_round:gptqmodel": ("gptq", {"checkpoint_format": "gptq_v2"}),
    "auto_round": ("gptq", {"checkpoint_format": "gptq_v2"}),
    "auto_round:auto_awq": ("awq", {"version": "gemm"}),
}


def packing(bits: int, across: bool = False, order: tuple[int, ...] = ()) -> Packing:
    return Packing(bits, across, order or tuple(range(32 // bits)))


def gptq(q: QuantisedTensors) -> Named:
    known = " and ".join(GPTQ_FORMATS)
    form = q.settings.get("checkpoint_format", "gptq")
    if not isinstance(form, str) or form not in GPTQ_FORMATS or q.settings.get("is_marlin_format"):
        raise CheckpointError(
            f"{q.path} has checkpoint_format {form!r}, which is packed for one kernel: import one in {known}, or a "
            ".gguf file"
        )
    biases = _zero_biases(q)
    for name, tensor in _without_sides(q, (ZEROS, SCALES, GROUPS)):
        if name not in biases:
            yield name, _gptq_matrix(q, tensor, name.removesuffix(WORDS), form) if name.endswith(WORDS) else tensor


def _zero_biases(q: QuantisedTensors) -> set[str]:
    """Those of packed modules, if all are zero: older versions of AutoGPTQ write one for each module."""
    packed_modules = (name.removesuffix(WORDS) + ".bias" for name in q.tensors if name.endswith(WORDS))
    biases = [name for name in packed_modules if name in q.tensors]
    known = all(q.tensors[name].is_plain and q.tensors[name].dtype in FLOAT_DTYPES for name in biases)
    if not biases or not known or any(small_values(q.tensors[name]).any() for name in biases):
        return set()
    q.notes.append(f"{len(biases)} biases left out, which are all zero; first {biases[0]}")
    return set(biases)


def _gptq_matrix(q: QuantisedTensors, tensor: SourceTensor, module: str, form: str) -> SourceTensor:
    scales, zeros, order = (
        q.need(module + SCALES, tensor),
        q.need(module + ZEROS, tensor),
        q.tensors.get(module + GROUPS),
    )
    _check_words(tensor)
    rows, outputs = tensor.shape
    bits = q.settings.get("bits")
    if order is not None and rows and 32 * rows % max(1, order.elements) == 0:  # modules may differ (`dynamic`)
        bits = 32 * rows // max(1, order.elements)
    elif order is None and outputs and len(zeros.shape) == 2 and 32 * zeros.shape[1] % outputs == 0:
        bits = 32 * zeros.shape[1] // outputs  # as of auto-round's `extra_config`
    bits = _checked_bits(bits, tensor)
    if order is None and q.settings.get("desc_act") and zeros.shape[0] > 1:
        raise CheckpointError(
            f"{tensor.name} has no {module}{GROUPS} in {tensor.path}, which says the order of its inputs (desc_act): "
            "download the checkpoint again"
        )
    packed_rows = packing(bits, across=True)
    matrix = packed(tensor, (rows * packed_rows.numbers, outputs), packed_rows)
    return _transposed(q, matrix, scales, zeros, packing(bits), order, GPTQ_FORMATS[form])


def auto_round(q: QuantisedTensors) -> Named:
    form, kind = q.settings.get("packing_format"), q.settings.get("data_type", "int")
    if not isinstance(form, str) or form not in AUTO_ROUND or kind != "int":
        raise CheckpointError(
            f"{q.path} is auto-round's {kind} with packing_format {form!r}, read is int with {', '.join(AUTO_ROUND)}: "
            "import one of them, the unquantised checkpoint, or a .gguf file"
        )
    method, settings = AUTO_ROUND[form]
    read = {"gptq": gptq, "awq": awq}[method]
    yield from read(QuantisedTensors(q.path, q.tensors, dict(q.settings) | settings, q.dtype, q.notes))


def awq(q: QuantisedTensors) -> Named:
    version = str(q.settings.get("version", "gemm")).lower()
    backend = str(q.settings.get("backend", "autoawq")).lower()
    if version not in AWQ_VERSIONS or backend == "llm-awq":
        shown = version if version not in AWQ_VERSIONS else backend
        raise CheckpointError(
            f"{q.path} is AWQ of version {shown}, which is packed for one kernel: import one of version gemm or gemv, "
            "or a .gguf file"
        )
    for name, tensor in _without_sides(q, (ZEROS, SCALES)):
        module = name.removesuffix(WORDS)
        if module == name:
            yield name, tensor
        elif version == GEMV:
            yield f"{module}.weight", _gemv_matrix(q, tensor, module)
        else:
            yield name, _gemm_matrix(q, tensor, module)


def _gemm_matrix(q: QuantisedTensors, tensor: SourceTensor, module: str) -> SourceTensor:
    in_words = _awq_packing(q, tensor, AWQ_ORDER)
    scales, zeros = q.need(module + SCALES, tensor), _awq_zeros(q, tensor, module)
    inputs, words = tensor.shape
    matrix = packed(tensor, (inputs, words * in_words.numbers), in_words)
    return _transposed(q, matrix, scales, zeros, in_words, None, 0)


def _gemv_matrix(q: QuantisedTensors, tensor: SourceTensor, module: str) -> SourceTensor:
    in_words = _awq_packing(q, tensor, ())
    scales, zeros = q.need(module + SCALES, tensor), q.need(module + ZEROS, tensor)
    outputs, words = tensor.shape
    inputs, numbers = words * in_words.numbers, in_words.numbers
    size = _group_size(q.settings) or inputs
    padded = len(scales.shape) == 2 and scales.shape[0] == outputs and scales.shape[1] * size >= inputs
    if not padded or inputs % size or scales.dtype not in FLOAT_DTYPES:
        raise misfit(scales, tensor)
    if not is_words(zeros) or zeros.shape != (outputs, scales.shape[1] // numbers) or scales.shape[1] % numbers:
        raise misfit(zeros, tensor)
    of_groups = packed(zeros, (outputs, scales.shape[1]), in_words)
    found = BlockScales(scales, 1, size, outputs, q.dtype, zeros=of_groups)
    return replace(packed(tensor, (outputs, inputs), in_words), scales=found)


def _awq_packing(q: QuantisedTensors, tensor: SourceTensor, order: tuple[int, ...]) -> Packing:
    bits = q.settings.get("bits", q.settings.get("w_bit"))
    _check_words(tensor)
    if bits != 4:
        raise CheckpointError(f"{tensor.name} is packed in {bits!r} bits in {tensor.path}: AWQ is read in 4")
    return packing(bits, order=order)


def _awq_zeros(q: QuantisedTensors, tensor: SourceTensor, module: str) -> SourceTensor | None:
    if q.settings.get("zero_point") is False and module + ZEROS not in q.tensors:
        return None
    return q.need(module + ZEROS, tensor)


def _transposed(
    q: QuantisedTensors,
    matrix: SourceTensor,
    scales: SourceTensor,
    zeros: SourceTensor | None,
    zero_packing: Packing,
    order: SourceTensor | None,
    above: int,
) -> SourceTensor:
    """A matrix [inputs, outputs], with a scale for each group of inputs. `above`: what must be added to zeros."""
    inputs, outputs = matrix.shape
    groups = scales.shape[0] if len(scales.shape) == 2 else 0
    size = block_size(inputs, groups, _group_size(q.settings))
    if size is None or scales.shape != (groups, outputs) or scales.dtype not in FLOAT_DTYPES:
        raise misfit(scales, matrix)
    if zeros is not None:
        if (
            not is_words(zeros)
            or zeros.shape != (groups, outputs // zero_packing.numbers)
            or outputs % zero_packing.numbers
        ):
            raise misfit(zeros, matrix)
        zeros = packed(zeros, (groups, outputs), zero_packing)
    of_inputs = b"" if order is None else group_order(order, inputs, groups, size)
    zero = above if zeros is not None else 1 << (zero_packing.bits - 1)
    found = BlockScales(scales, size, 1, inputs, q.dtype, zero=zero, zeros=zeros, groups=of_inputs, transposed=True)
    return replace(matrix, scales=found)


def packed_integers(q: QuantisedTensors, module: str, tensor: SourceTensor) -> SourceTensor:
    """The weight of compressed-tensors' `module`, from its weight_packed."""
    _check_words(tensor)
    shape = q.need(f"{module}.weight_shape", tensor)
    outputs, words = tensor.shape
    if shape.dtype not in ("I64", "I32") or shape.elements != 2:
        raise CheckpointError(f"{shape.name} is {list(shape.shape)} of {shape.dtype} in {shape.path}, not two sizes")
    rows, inputs = (int(size) for size in small_values(shape))
    bits = next((bits for bits in BITS if words * (32 // bits) == inputs), None)
    if rows != outputs or bits is None:
        raise CheckpointError(
            f"{tensor.name} has shape {list(tensor.shape)} in {tensor.path}, which is no matrix {[rows, inputs]} of 4 "
            "or 8 bits: import the unquantised checkpoint, or a .gguf file"
        )
    whole = packed(tensor, (outputs, inputs), packing(bits))
    return with_zeros(q, module, whole, bits)


def with_zeros(q: QuantisedTensors, module: str, whole: SourceTensor, bits: int) -> SourceTensor:
    """A matrix [outputs, inputs] of compressed-tensors, with its scales, and its zeros if it has some.

    `bits`: of packed numbers; 0 if they are signed and not packed.
    """
    matrix = scaled(whole, q.need(f"{module}.weight_scale", whole), q.dtype)
    assert matrix.scales is not None
    if matrix.scales.tensor.shape[0] not in (1, whole.shape[0]):  # they have no blocks of several rows
        raise misfit(matrix.scales.tensor, whole)
    above = 1 << (bits - 1) if bits else 0
    scales, zeros = matrix.scales, q.tensors.get(f"{module}.weight_zero_point")
    if zeros is None:
        if _asymmetric(q.settings):
            q.need(f"{module}.weight_zero_point", whole)
        scales = replace(scales, zero=above)
    else:
        in_words = bits and is_words(zeros)
        shape = scales.tensor.shape
        if in_words:
            rows = packing(bits, across=True)
            fits = zeros.shape == (-(-shape[0] // rows.numbers), shape[1])
            found = packed(zeros, (zeros.shape[0] * rows.numbers, shape[1]), rows)
        else:
            found = replace(zeros, shape=as_matrix(zeros, whole))
            fits = zeros.encoding == plain("I8") and found.shape == shape
        if not fits:
            raise misfit(zeros, whole)
        scales = replace(scales, zeros=found, zero=0 if in_words else above)
    order = q.tensors.get(f"{module}.weight_g_idx")
    if order is not None:
        groups = scales.tensor.shape[1]
        scales = replace(scales, groups=group_order(order, whole.shape[1], groups, scales.columns))
    return replace(matrix, scales=scales)


def _asymmetric(settings: Mapping[str, Any]) -> bool:
    """Whether all matrices of compressed-tensors have zeros."""
    groups = settings.get("config_groups")
    found = (
        [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )
    said = [weights.get("symmetric") for weights in found if isinstance(weights, dict)]
    return bool(said) and all(symmetric is False for symmetric in said)


def _without_sides(q: QuantisedTensors, sides: tuple[str, ...]) -> Named:
    """The tensors that are not scales, zeros or groups of packed ones."""
    for name, tensor in q.tensors.items():
        module = next((name.removesuffix(side) for side in sides if name.endswith(side)), None)
        if module is None or module + WORDS not in q.tensors:
            yield name, tensor


def _check_words(tensor: SourceTensor) -> None:
    if not is_words(tensor):
        raise CheckpointError(
            f"{tensor.name} has shape {list(tensor.shape)} of {tensor.dtype} in {tensor.path}, not a matrix of 32-bit "
            "words"
        )


def _checked_bits(bits: Any, tensor: SourceTensor) -> int:
    if type(bits) is not int or bits not in BITS:
        raise CheckpointError(
            f"{tensor.name} is packed in {bits!r} bits in {tensor.path}, read are {' and '.join(map(str, BITS))}: "
            "import the unquantised checkpoint, or a .gguf file"
        )
    return bits


def _group_size(settings: Mapping[str, Any]) -> int | None:
    """None: one group has all inputs."""
    size = settings.get("group_size", settings.get("q_group_size"))
    return size if type(size) is int and size > 0 else None
