"""Finds the tensors of a model of transformers in a checkpoint.

transformers knows how the names and shapes in published checkpoints differ from those of its modules: renamed modules,
experts that are merged into one tensor, projections that are fused or split. Its own loader is run on tensors without
elements (tracing.py), so that every rule of the installed version applies, and from_pretrained's treatment of prefixes,
tied weights and ignored names with them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from flashclient.errors import ModelError
from flashclient.tensors.places import Piece, Place, Shape, gather, matrix, tensors_of
from flashclient.tensors.tracing import TracedTensor
from weightd_proto.weightd_pb2 import LeftOut, MatrixSource, TensorSource

# Tensors that follow from the configuration: rotary frequencies, sinusoidal positions, a version.
IMPLIED = re.compile(
    r"(\.|^)(rotary_emb\.(inv_freq|(cos|sin)_cached)|embed_positions\.weights|decoder\.version|rope_freqs\.weight)$"
)
# Causal masks, and the number that stood for no attention: checkpoints of GPT-2's time hold them.
MASK = re.compile(r"(\.|^)(attn|(self_)?attention)\.(bias|masked_bias|causal_mask)$")
FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_modules")  # fields of configs
FURTHER_TOKENS = re.compile(r"(\.|^)(mtp|nextn|eagle|medusa)\w*\.")
# The loader of older versions needs to be told that no tensor is distributed.
_PARAMETERS = inspect.signature(convert_and_load_state_dict_in_model).parameters
_ARGUMENTS: dict[str, Any] = {"tp_plan": None} if "tp_plan" in _PARAMETERS else {}
LAYER = re.compile(r"(?:\.|^)layers\.(\d+)\.")


@dataclass(frozen=True)
class Found:
    """Where a model's tensors lie in a checkpoint.

    Attributes:
        places: of the tensors of the model's state_dict, by name. Of weights that are tied to each other, only the
            first is here, unless the checkpoint holds both.
        tied: tensors that the checkpoint holds although the configuration ties them, and what it ties them to. They
            are tied only if their values are equal.
        left_out: tensors that the model does not use, by the reason.
    """

    places: dict[str, Place]
    tied: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def left_out_messages(self) -> list[LeftOut]:
        return [LeftOut(reason=reason, tensors=names) for reason, names in self.left_out.items()]


def places_of(sources: Mapping[str, TensorSource], shapes: Mapping[str, Shape]) -> dict[str, Place]:
    """The places of tensors that are put together from those of a checkpoint, which have these shapes."""
    whole = {name: TracedTensor.whole(name, shape, torch.float32) for name, shape in shapes.items()}
    return {name: gather(source, whole).place for name, source in sources.items()}  # type: ignore[attr-defined]


def find_tensors(model: PreTrainedModel, tensors: Mapping[str, Place]) -> Found:
    """Finds the tensors of `model`, which is on the meta device, in a checkpoint.

    Args:
        tensors: of the checkpoint, by the names that transformers' loader knows. Piece.whole() is the place of one that
            is published under such a name.

    Raises:
        ModelError: a tensor is missing or has another shape than in the model, or the checkpoint has one that the model
            has no place for. It would be lost.
    """
    load = _Load(model, tensors)
    places, tied = _tie(model, load.places)
    missing = sorted(load.missing - places.keys() - tied_pairs(model).keys())
    if load.errors:
        name = next(iter(load.errors))
        raise ModelError(f"{name} cannot be made from the tensors of the checkpoint: {load.errors[name]}")
    if load.mismatched:
        name, found, expected = min(load.mismatched)
        raise ModelError(
            f"{name} has shape {list(found)} in the checkpoint, but the configuration says {list(expected)}"
        )
    if missing:
        raise ModelError(f"the checkpoint lacks the tensor {missing[0]}")
    used = {name for place in places.values() for name in tensors_of(place)}
    unused = [name for name, place in tensors.items() if used.isdisjoint(tensors_of(place))]
    return Found(places, tied, _left_out(model, load, {name: tensors[name].shape for name in unused}))


def own_tensors(model: PreTrainedModel) -> Found:
    """As find_tensors(), of a checkpoint that holds the tensors of `model` itself: where there is no other one."""
    tied = tied_pairs(model)
    state = model.state_dict()
    return Found({name: Piece.whole(name, tuple(state[name].shape)) for name in state if name not in tied})


def kept_in_f32(model: PreTrainedModel) -> dict[str, list[str]]:
    """Tensors that transformers keeps in F32, and the dtypes of models in which it does."""
    kept: dict[str, list[str]] = {}
    for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        patterns = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
        for tensor in model.state_dict():
            if any(pattern.search(tensor) for pattern in patterns):
                kept.setdefault(tensor, []).append(name)
    return kept


def part_source(place: Place, index: tuple[int | slice, ...], neurons_dim: int = 0) -> MatrixSource:
    """The rows of one part of an FFN or of one expert.

    Args:
        place: of the parameter that holds the part.
        index: of the part in the parameter: an integer or a slice for each dimension; two slices.
        neurons_dim: which of the two runs along the neurons.
    """
    dim = 0
    for entry in index:
        if isinstance(entry, slice):
            begin, end, step = entry.indices(place.shape[dim])
            if (begin, end, step) != (0, place.shape[dim], 1):
                place = place.sliced(dim, begin, end, step)
            dim += 1
        else:
            place = place.selected(dim, entry)
    return matrix(place if neurons_dim == 0 else place.permuted((1, 0)))


class _Load:
    """What transformers' loader does with the tensors of a checkpoint."""

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, Place]) -> None:
        self._mapping = get_model_conversion_mapping(model)
        traced = {name: TracedTensor(place, model.dtype) for name, place in tensors.items()}
        mapping: Any = self._mapping
        config = LoadStateDictConfig(device_map={"": "meta"}, dtype=model.dtype, weight_mapping=mapping)
        with _restored(model), _without_progress():
            info, _ = convert_and_load_state_dict_in_model(
                model=model, state_dict=traced, load_config=config, **_ARGUMENTS
            )
            state = model.state_dict(keep_vars=True)
            self.places = {name: value.place for name, value in state.items() if isinstance(value, TracedTensor)}
        unexpected = set(info.unexpected_keys)
        model._adjust_missing_and_unexpected_keys(info)
        self._ignored = unexpected - info.unexpected_keys
        self.missing = set(info.missing_keys)
        self.mismatched = set(info.mismatched_keys)
        self.errors = {name: _reason(text) for name, text in info.conversion_errors.items()}

    def ignores(self, model: PreTrainedModel, name: str) -> bool:
        """Whether transformers leaves a tensor of the checkpoint out without a warning."""
        if not self._ignored:
            return False
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, model.state_dict())
        return not self._ignored.isdisjoint({name, renamed})


def _reason(text: str) -> str:
    """The line of a report of the loader that names the error."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("Error: ")]
    return lines[-1].strip() if lines else "unknown"


@contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    """Undoes what is assigned to the model's parameters and buffers."""
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    attributes = dict(vars(model))
    try:
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for name in vars(model).keys() - attributes.keys():
            delattr(model, name)


@contextmanager
def _without_progress() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


# Tied weights


def tied_pairs(model: PreTrainedModel) -> dict[str, str]:
    """Weights that the configuration ties, and what it ties them to."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _tie(model: PreTrainedModel, found: Mapping[str, Place]) -> tuple[dict[str, Place], dict[str, str]]:
    """As in tie_weights(): a tied weight replaces a missing one. If both are there, the import compares them."""
    places, tied = dict(found), {}
    for target, source in tied_pairs(model).items():
        if target not in places:
            continue
        if source not in places:
            places[source] = places.pop(target)
        elif places[target] == places[source]:
            del places[target]
        else:
            tied[target] = source
    return places, tied


# Tensors that nothing uses


def _left_out(model: PreTrainedModel, load: _Load, unused: Mapping[str, Shape]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    lost = []
    for name in sorted(unused):
        reason = _reason_to_leave_out(model, load, name, unused[name])
        if reason is None:
            lost.append(name)
        else:
            reasons.setdefault(reason, []).append(name)
    if lost:
        raise ModelError(
            f"the checkpoint holds {len(lost)} tensors that its configuration has no place for, first {lost[0]}: "
            "correct the configuration, or remove them"
        )
    return reasons


def _reason_to_leave_out(model: PreTrainedModel, load: _Load, name: str, shape: Shape) -> str | None:
    if IMPLIED.search(name) or (MASK.search(name) and _is_mask(shape)):
        return "they follow from the configuration"
    if FURTHER_TOKENS.search(name) or _is_further_layer(model.config, name):
        return "they predict further tokens, which transformers does not"
    if load.ignores(model, name):
        return f"transformers' {type(model).__name__} does not use them"
    return None


def _is_mask(shape: Shape) -> bool:
    return prod(shape) == 1 or (len(shape) == 4 and shape == (1, 1, shape[-1], shape[-1]))


def _is_further_layer(config: Any, name: str) -> bool:
    """Layers after the last are the modules that predict further tokens (DeepSeek-V3, GLM-4.5, MiniMax-M2)."""
    further = max(getattr(config, field, None) or 0 for field in FURTHER_LAYERS)
    layer = LAYER.search(name)
    return layer is not None and 0 <= int(layer[1]) - config.num_hidden_layers < further
