"""The tensors of a checkpoint that a recipe uses: their dtypes, and weights that are tied only if they are equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from weightd.disk.read_ahead import ReadAhead
from weightd.disk.tensors import SourceTensor
from weightd.errors import CheckpointError
from weightd.importing.dequantise import dequantise
from weightd.importing.plan import ElementRun, runs_of
from weightd_proto.encodings import COMPUTE_DTYPES
from weightd_proto.tensor_sources import tensor_names
from weightd_proto.weightd_pb2 import Recipe, ResidentSource

INTEGERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")

Tensors = Mapping[str, SourceTensor]


def used_tensors(recipe: Recipe, tensors: Tensors) -> dict[str, SourceTensor]:
    """The tensors that the recipe uses, by name.

    CheckpointError for one that is not F32, BF16 or F16, unless it is resident and holds integers. (Quantised
    ones become floats.)
    """
    used = {part.tensor: True for ffn in recipe.ffns for expert in ffn.experts for part in expert.parts}
    for resident in recipe.resident:
        names = tensor_names(resident.source)
        has_integers = len(names) == 1 and tensors[names[0]].dtype in INTEGERS
        used |= {name: not has_integers or used.get(name, False) for name in names}
    for name, must_be_float in used.items():
        tensor = tensors[name]
        if must_be_float and tensor.dtype not in COMPUTE_DTYPES.values():
            known = ", ".join(COMPUTE_DTYPES.values())
            raise CheckpointError(f"{name} has dtype {tensor.dtype} in {tensor.path}, known are {known}")
    return {name: tensors[name] for name in used}


def without_equal_ties(recipe: Recipe, tensors: Tensors) -> list[ResidentSource]:
    """The resident tensors, without those that equal the ones they are tied to.

    As in transformers' tie_weights(), a weight that differs from the one it is tied to is a weight of its own.
    """
    by_name = {resident.name: resident for resident in recipe.resident}
    return [
        resident
        for resident in recipe.resident
        if not resident.tied_to or not _are_equal(resident, by_name[resident.tied_to], tensors)
    ]


def _are_equal(one: ResidentSource, other: ResidentSource, tensors: Tensors) -> bool:
    if one.source == other.source:
        return True
    if one.source.WhichOneof("of") != "tensor" or other.source.WhichOneof("of") != "tensor":
        return False
    return _hold_the_same(tensors[one.source.tensor], tensors[other.source.tensor])


def _hold_the_same(one: SourceTensor, other: SourceTensor) -> bool:
    """Whether two tensors hold the same values. In torch's files one tensor may have two names."""
    if one.shape != other.shape:
        return False
    if replace(one, name=other.name) == other:
        return True
    runs = max((list(runs_of(tensor)) for tensor in (one, other)), key=len)
    pairs = [(ElementRun(one, run.begin, run.end), ElementRun(other, run.begin, run.end)) for run in runs]
    with ReadAhead([extent for pair in pairs for run in pair for extent in run.extents]) as read_ahead:
        for first, second in pairs:
            with read_ahead.take_all(first.extents) as a, read_ahead.take_all(second.extents) as b:
                values, others = dequantise(first, a).as_dtype("F32"), dequantise(second, b).as_dtype("F32")
                if not np.array_equal(values, others):
                    return False
    return True
