"""Chooses the dtype in which a model is computed, and the encoding of its bundles.

The dtype is the same for all tensors that hold floats, as in transformers, which keeps few tensors of some models in
F32. Bundles are stored in it, too, unless they are quantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from weightd.disk.read_ahead import ReadAhead
from weightd.disk.tensors import SourceTensor
from weightd.errors import CheckpointError
from weightd.importing.assembly import kept_format
from weightd.importing.dequantise import dequantise
from weightd.importing.plan import runs_of
from weightd.importing.quantised.by_neuron import neuron_format
from weightd.importing.slabs import Slabs, slabs_of
from weightd.importing.units import Unit
from weightd_proto.encodings import BLOCK_FORMATS, COMPUTE_DTYPES, LAYOUTS, QUANTISED_DTYPES, in_blocks, is_plain, plain
from weightd_proto.tensor_sources import tensor_names
from weightd_proto.weightd_pb2 import Encoding, Recipe, ResidentSource

KEEP = "keep"
NEURON, SLAB = LAYOUTS
PLAIN = "plain"
SMALL_ELEMENTS_MAX = 4 << 20  # routers have at most 3 million


def stored_dtype(recipe: Recipe, tensors: Mapping[str, SourceTensor], request: str) -> str:
    """F32, BF16 or F16. `keep` means the narrowest dtype that holds every value of the checkpoint exactly. So do int8
    and int4, which are encodings of the bundles alone.

    For matrices the dtype decides. Vectors (norms, biases) and small matrices outside the FFNs may have a wider dtype:
    llama.cpp stores norms and routers in F32 beside F16 matrices. For them the values decide, so that they do not
    double the size of the model.
    """
    if request in COMPUTE_DTYPES:
        return COMPUTE_DTYPES[request]
    floats = {name: tensor for name, tensor in tensors.items() if tensor.dtype in COMPUTE_DTYPES.values()}
    apart = {name for source in recipe.resident if source.f32_in for name in tensor_names(source.source)}
    parts = {part.tensor for ffn in recipe.ffns for expert in ffn.experts for part in expert.parts}
    small = {name for name, tensor in floats.items() if _is_small(tensor) and name not in parts}
    matrices = {tensor.dtype for name, tensor in floats.items() if name not in small | apart}
    matrices = matrices or {tensor.dtype for name, tensor in floats.items() if len(tensor.shape) > 1}
    if len(matrices) != 1:
        return "F32"
    (dtype,) = matrices
    kept = {name for s in recipe.resident if dtype in s.f32_in for name in tensor_names(s.source)}
    others = [tensor for name, tensor in floats.items() if name in small and name not in kept]
    return dtype if dtype == "F32" or _hold_exactly(others, dtype) else "F32"


def kept_slabs(units: Sequence[Unit], request: str, layout: str) -> tuple[Slabs | None, tuple[str, ...]]:
    """Slabs for a checkpoint whose FFNs are quantised, where --dtype and --layout (empty: what is best) keep them.

    And what a user should know.

    CheckpointError where slabs are asked for and cannot be had.
    """
    if request != KEEP and layout == SLAB:
        raise CheckpointError(f"--layout {SLAB} keeps what is quantised as published: leave --dtype {request} out")
    if request != KEEP or layout == NEURON:
        return None, ()
    try:
        slabs = slabs_of(units)
    except CheckpointError as error:
        if layout == SLAB:
            raise CheckpointError(f"{error}: leave --layout {SLAB} out") from error
        return None, (f"the FFNs are dequantised and stored neuron by neuron: {error}",)
    if slabs is None and layout == SLAB:
        known = ", ".join(BLOCK_FORMATS)
        raise CheckpointError(
            f"no FFN of the checkpoint is quantised in a format that kernels compute with ({known}), so slabs would "
            f"keep nothing: leave --layout {SLAB} out"
        )
    return slabs, tuple(_unkept(units)) if slabs is None else slabs.notes


def _unkept(units: Sequence[Unit]) -> Iterator[str]:
    """What is said of FFNs in blocks with scales of their own, none of which is kept."""
    tensors = [part.matrix.tensor for unit in units for part in unit.parts]
    formats = dict.fromkeys(
        tensor.encoding.format for tensor in tensors if tensor.scales is None and not is_plain(tensor.encoding)
    )
    if formats:
        yield (
            f"the FFNs are dequantised to fp32, because their blocks of {', '.join(formats)} cannot be kept: with "
            "--dtype int4, int8 or bf16 they take less"
        )


def kept_neurons(units: Sequence[Unit], request: str, layout: str) -> tuple[Encoding | None, tuple[str, ...]]:
    """The encoding of neurons that are kept as published one by one, where --dtype and --layout ask for that and it can
    be. And what a user should know."""
    format = neuron_format(units) if (request, layout) == (KEEP, NEURON) else ""
    if not format:
        return None, ()
    return in_blocks(format), (f"the FFNs stay quantised as published ({format}), neuron by neuron",)


def bundle_encoding(recipe: Recipe, request: str, dtype: str) -> Encoding:
    """How the bundles of a model that is computed in `dtype` are stored by neuron. CheckpointError if its rows are no
    whole blocks."""
    format = QUANTISED_DTYPES.get(request)
    if format is None:
        return plain(dtype)
    encoding, hidden_size = in_blocks(format), recipe.model.bundle.hidden_size
    if hidden_size % encoding.block_values != 0:
        raise CheckpointError(
            f"the FFNs have {hidden_size} inputs, which are not whole blocks of {encoding.block_values} values, as "
            f"--dtype {request} needs: import with --dtype bf16"
        )
    return encoding


def resident_dtype(source: ResidentSource, tensors: Mapping[str, SourceTensor], dtype: str) -> str:
    """The dtype of a resident tensor of a model that is stored in `dtype`. Integers stay what they are."""
    found = {tensors[name].dtype for name in tensor_names(source.source)}
    if found.isdisjoint(COMPUTE_DTYPES.values()):
        return min(found)
    return "F32" if dtype in source.f32_in else dtype


def resident_format(
    recipe: Recipe,
    source: ResidentSource,
    tensors: Mapping[str, SourceTensor],
    dtype: str,
    of_model: str,
    request: str,
) -> str:
    """The format of blocks in which a resident tensor's rows are stored, or `dtype`, which is its own.

    `of_model`: the import's --dtype. `request`: plain, keep, int8, int4, or empty: keep with --dtype keep, else plain.
    Kept are rows that lie in the checkpoint in a format that kernels know. What is no matrix of whole blocks stays
    plain. int4 is for matrices of layers: embeddings and heads get 8 bits. int8 and int4 never quantise routers, which
    are small and whose rounding would pick other experts.
    """
    request = _resident_request(of_model, request)
    if request == PLAIN or not source.rows or len(source.shape) != 2 or dtype not in COMPUTE_DTYPES.values():
        return dtype
    if request == KEEP:
        return kept_format(source, tensors) or dtype
    in_a_layer = any(part.isdigit() for part in source.name.split("."))
    format = QUANTISED_DTYPES[request if in_a_layer else "int8"]  # 4 bits would cost 10 to 15 % more of perplexity
    is_router = any(layer.experts == source.shape[0] for layer in recipe.model.layers)
    return dtype if is_router or source.shape[1] % in_blocks(format).block_values else format


def table_format(
    source: ResidentSource, tensors: Mapping[str, SourceTensor], dtype: str, of_model: str, request: str
) -> str:
    """The format in which a tensor is stored if it becomes a table: blocks that are kept, or `dtype`.

    `of_model`, `request`: as of resident_format(). A table is not quantised, because its rows take no memory.
    """
    kept = kept_format(source, tensors) if _resident_request(of_model, request) == KEEP else None
    return kept or dtype


def _resident_request(of_model: str, request: str) -> str:
    return request or (KEEP if of_model == KEEP else PLAIN)


def _is_small(tensor: SourceTensor) -> bool:
    return len(tensor.shape) <= 1 or tensor.elements <= SMALL_ELEMENTS_MAX


def _hold_exactly(tensors: list[SourceTensor], dtype: str) -> bool:
    others = [run for t in tensors if t.dtype != dtype or t.undo is not None for run in runs_of(t)]
    with ReadAhead([extent for run in others for extent in run.extents]) as read_ahead:
        for run in others:
            with read_ahead.take_all(run.extents) as stored:
                elements = dequantise(run, stored)
                values = elements.as_dtype("F32").view(np.float32)
                narrow = type(elements)(dtype, elements.as_dtype(dtype)).as_dtype("F32").view(np.float32)
                if not np.array_equal(values, narrow, equal_nan=True):
                    return False
    return True
