"""Queries, keys and values of a layer in one native call: projections, norms of heads, rotary embedding.

An attention module becomes native if it is the plain one: three projections of its input, whose rows may lie in one
matrix one after the other, perhaps norms, perhaps a rotation by `position_embeddings`, transformers' attention
interface, and a projection of what that returns. This is
shown by running the module's own forward for random inputs: the queries, keys and values that it passes on must be the
kernel's, and so must what it returns. What the module is called, and what it is made of, does not matter; a module that
does anything else keeps its forward.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from flashclient._native import AttentionInputs, AttentionProjection, Workers
from flashclient.kernels.arrays import KernelOf, array_of
from flashclient.kernels.decode_attention import NativeName, attend
from flashclient.kernels.dtypes import KERNEL_DTYPES
from flashclient.kernels.encoded_matrix import matrix_of
from flashclient.kernels.growing_cache import int8_layer
from flashclient.kernels.resident_linear import BIAS_DTYPES, ResidentLinear
from flashclient.kernels.resident_norm import NativeNorm
from flashclient.kernels.trials import (
    Native,
    has_tensors,
    is_plain,
    make_native,
    random_angles,
    random_tensors,
    same_but_for_rounding,
    scalars,
)

TRIED_ARGUMENTS = {
    *("hidden_states", "position_embeddings", "attention_mask", "position_ids", "cache_position", "use_cache", "kwargs")
}
PROBE = "native_probe"  # in transformers' registry: an attention that records what it is called with
TRIED_SCALES = (1.0, 100.0)  # of inputs; large ones reach limits and softcaps
TRIED_TOKENS = 3
TRIED_POSITIONS = (0, 1_000_003)  # tokens in the cache; some modules scale queries by their position
QUERY, KEY, VALUE = ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")
FUSED = ("qkv_proj", "query_key_value", "Wqkv", "c_attn")  # all three
OUTPUT = ("o_proj", "out_proj", "dense")
QUERY_NORM, KEY_NORM = ("q_norm", "q_layernorm", "query_layernorm"), ("k_norm", "k_layernorm", "key_layernorm")
CACHE_NAMES = ("past_key_values", "past_key_value")


class Call(NamedTuple):
    """What an attention module passed to the attention interface, and what it got back."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    arguments: dict[str, Any]
    attended: Tensor


class ProbeCache:
    """A cache that keeps what it is given, and returns copies."""

    def __init__(self, held: int) -> None:
        self._held = held  # tokens that it says it has
        self.given: tuple[Tensor, Tensor, int, Any] | None = None
        self.returned: tuple[Tensor, Tensor] | None = None

    def update(self, key: Tensor, value: Tensor, layer: int, more: Any = None) -> tuple[Tensor, Tensor]:
        self.given = (key, value, layer, more)
        self.returned = (key.clone(), value.clone())
        return self.returned

    def get_seq_length(self, layer: int = 0) -> int:
        return self._held


class _Calls(threading.local):
    """The calls that a thread has recorded."""

    def __init__(self) -> None:
        self.made: list[Call] = []


_recorded = _Calls()


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """Records a call, and returns random values as attended ones."""
    sequences, heads, tokens, _ = query.shape
    attended = random_tensors(query.dtype)(sequences, tokens, heads, value.shape[3])
    _recorded.made.append(Call(query, key, value, attention_mask, arguments, attended))
    return attended, None


AttentionInterface.register(PROBE, _record)


@dataclass(frozen=True)
class Parts:
    """Names of an attention module's children. A fused projection is that of queries, keys and values."""

    query: str
    key: str
    value: str
    output: str
    query_norm: str | None
    key_norm: str | None

    @cached_property
    def names(self) -> list[str]:
        """All of them."""
        every = (self.query, self.key, self.value, self.output, self.query_norm, self.key_norm)
        return list(dict.fromkeys(one for one in every if one is not None))


@dataclass(frozen=True)
class AttentionFormula:
    """What a module computes before it attends.

    Attributes:
        elements: of a head.
        rows: of queries, keys and values in their projections.
        factor: of queries.
        pairs: which elements rotate together (client/native/kernels/attention_inputs.h).
        widths: that cos and sin may have; none where nothing rotates.
        names: of the arguments of the module's forward.
        cache: the name of the argument that is the cache.
        cached: names of what the cache is given beside keys and values.
        arguments: what it passes to the attention interface, beside its caller's.
    """

    parts: Parts
    elements: int
    rows: tuple[int, int, int]
    factor: float
    pairs: str
    widths: tuple[int, ...]
    names: tuple[str, ...]
    cache: str
    cached: tuple[str, ...]
    arguments: dict[str, Any]

    @cached_property
    def slices(self) -> list[slice]:
        """Where queries, keys and values are among the rows of their projections."""
        if self.parts.query != self.parts.key:
            return [slice(None)] * 3
        ends = list(itertools.accumulate(self.rows))
        return [slice(end - count, end) for end, count in zip(ends, self.rows, strict=True)]

    @cached_property
    def untried(self) -> list[str]:
        """Arguments of the module that no trial has given it: with one of them it may compute something else."""
        return [name for name in self.names if name not in (*TRIED_ARGUMENTS, self.cache)]


class FusedAttention(Native):
    """The forward pass of an attention module that became native. Other cases are left to the class that it had."""

    config: Any
    layer_idx: int
    formula: AttentionFormula
    input_kernels: KernelOf[AttentionInputs]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        formula = self.formula
        call = dict(zip(formula.names, args, strict=False)) | kwargs
        x, embeddings = call.pop("hidden_states", None), call.pop("position_embeddings", None)
        untried = any(call.get(name) not in (None, False) for name in formula.untried)
        if untried or len(args) > len(formula.names) or not self.is_for_kernel(x, embeddings):
            return super().forward(*args, **kwargs)
        assert x is not None
        query, key, value = self._inputs(x, embeddings)
        cache = call.pop(formula.cache, None)
        if cache is not None:
            known = {"cos": embeddings and embeddings[0], "sin": embeddings and embeddings[1]} | call
            more = ({name: known.get(name) for name in formula.cached},) if formula.cached else ()
            int8 = int8_layer(cache, self.layer_idx)
            if int8 is None:
                key, value = cache.update(key, value, self.layer_idx, *more)
            else:
                key, value = int8.append(key, value)
        mask = call.pop("attention_mask", None)
        attended, weights = attend(self, query, key, value, mask, **(call | formula.arguments))
        output = self._modules[formula.parts.output]
        assert output is not None
        return output(attended.reshape(*x.shape[:-1], -1)), weights

    def _inputs(self, x: Tensor, embeddings: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [sequences, heads, tokens, elements] each."""
        formula = self.formula
        x = x.detach().contiguous()
        sequences, tokens, _ = x.shape
        projections = self.projections()
        outputs = [
            torch.empty(sequences, rows // formula.elements, tokens, formula.elements, dtype=x.dtype, device="cpu")
            for _, rows in projections
        ]
        cos, sin = (array_of(one) for one in embeddings) if formula.widths else (None, None)
        query, key, value = (one for one, _ in projections)
        arrays = (array_of(x), cos, sin, *map(array_of, outputs))
        self.input_kernels[x.dtype].compute(query, key, value, formula.pairs, *arrays)
        return outputs[0], outputs[1], outputs[2]

    def projections(self) -> list[tuple[AttentionProjection, int]]:
        """Those of queries, keys and values, with the weights that the module has now, and their rows."""
        formula = self.formula
        parts = formula.parts
        names = ((parts.query, parts.query_norm), (parts.key, parts.key_norm), (parts.value, None))
        modules = [(self._modules[name], None if norm is None else self._modules[norm]) for name, norm in names]
        pointers = tuple(_pointers(one) for pair in modules for one in pair if one is not None)
        held = self.__dict__.get("_held")
        if held is None or held[0] != pointers:
            made = [
                _projection(linear, norm, formula.factor if index == 0 else 1.0, formula.slices[index])
                for index, (linear, norm) in enumerate(modules)
            ]
            held = self.__dict__["_held"] = (pointers, made)
        projections: list[tuple[AttentionProjection, int]] = held[1]
        return projections

    def is_for_kernel(self, x: Tensor | None, embeddings: Any) -> bool:
        """Whether the kernels compute this call."""
        return x is not None and not self.training and self.is_plain(x) and self.takes(x, embeddings)

    def is_plain(self, x: Tensor) -> bool:
        """Whether the weights are as the kernels take them, need no gradient, and have no hooks."""
        parts = self.formula.parts
        linears = (parts.query, parts.key, parts.value)
        norms = [one for one in (parts.query_norm, parts.key_norm) if one is not None]
        return all(is_plain(self._modules[one], ResidentLinear, x, BIAS_DTYPES) for one in linears) and all(
            is_plain(self._modules[one], NativeNorm, x) for one in norms
        )

    def takes(self, x: Tensor, embeddings: Any) -> bool:
        """Whether the kernels take this input, and attention is ours."""
        if torch.compiler.is_compiling() or x.dim() != 3 or not self.input_kernels.takes(x):
            return False
        if "forward" in self.__dict__ or not isinstance(_implementation(self.config), NativeName):
            return False
        return not self.formula.widths or _are_angles(embeddings, x, self.formula.widths)


def _implementation(config: Any) -> Any:
    """config._attn_implementation, whose property takes some microseconds."""
    return vars(config).get("_attn_implementation_internal") or config._attn_implementation


def _are_angles(embeddings: Any, x: Tensor, widths: tuple[int, ...]) -> bool:
    if not isinstance(embeddings, tuple) or len(embeddings) != 2:
        return False
    cos, sin = embeddings
    return all(
        isinstance(one, Tensor)
        and one.dim() == 3
        and one.dtype == x.dtype
        and one.is_cpu
        and one.stride(-1) == 1
        and one.stride() == cos.stride()
        and one.shape[0] in (1, x.shape[0])
        and one.shape == cos.shape
        and one.shape[1] == x.shape[1]
        and one.shape[2] in widths
        for one in (cos, sin)
    )


def _pointers(module: nn.Module) -> tuple[int, ...]:
    return tuple(one.data_ptr() for one in module._parameters.values() if one is not None)


def _projection(linear: Any, norm: Any, factor: float, rows: slice) -> tuple[AttentionProjection, int]:
    bias = None if linear.bias is None else array_of(linear.bias[rows])
    native = norm.native_norm() if norm is not None else None
    count = len(range(len(linear.weight))[rows])
    return AttentionProjection(matrix_of(linear.weight, rows), bias, native, factor), count


def use_fused_attention(model: PreTrainedModel, workers: Workers, instruction_set: str | None = None) -> int:
    """Makes every attention module of `model` native that is the plain one. After use_decode_attention().

    Args:
        workers: shared with the other kernels.
        instruction_set: of the names in native/kernels/kernels.h; None takes the best.

    Returns:
        The number of modules changed.

    Raises:
        ValueError: the processor does not have `instruction_set`.
    """
    kernels = KernelOf({one: AttentionInputs(workers, name, instruction_set) for one, name in KERNEL_DTYPES.items()})

    def find(module: nn.Module) -> dict[str, Any] | None:
        parts = _parts(module)
        formula = None if parts is None else _found(module, parts, kernels)
        return None if formula is None else {"formula": formula, "input_kernels": kernels}

    return make_native(model, FusedAttention, _key, find)


def _key(module: nn.Module) -> Any:
    """What decides for a module, but for the values of its weights; None: it is no attention, or has other parts."""
    parts = _parts(module) if hasattr(module, "decode_kernels") else None
    shapes = tuple((name, tuple(one.shape), one.dtype) for name, one in module.named_parameters())
    return None if parts is None else (type(module), parts, scalars(module), shapes)


def _parts(module: nn.Module) -> Parts | None:
    """The children that the formula may have. None where there are others with weights, or none of these."""

    def named(names: tuple[str, ...], kind: type[nn.Module]) -> str | None:
        return next((name for name in names if isinstance(module._modules.get(name), kind)), None)

    query, key, value, output = (named(names, ResidentLinear) for names in (QUERY, KEY, VALUE, OUTPUT))
    if query is None and key is None and value is None:
        query = key = value = named(FUSED, ResidentLinear)
    if query is None or key is None or value is None or output is None:
        return None
    norms = (named(QUERY_NORM, NativeNorm), named(KEY_NORM, NativeNorm))
    known = {query, key, value, output, *norms}
    others = [name for name, _ in module.named_parameters() if name.partition(".")[0] not in known]
    others += [name for name, _ in module.named_buffers()]
    if others or has_tensors(module) or (norms[0] is None) != (norms[1] is None):
        return None
    return Parts(query, key, value, output, *norms)


def _found(module: Any, parts: Parts, kernels: dict[torch.dtype, AttentionInputs]) -> AttentionFormula | None:
    names = tuple(name for name in inspect.signature(type(module).forward).parameters if name != "self")
    caches = [name for name in CACHE_NAMES if name in names]
    if "hidden_states" not in names or not caches or not hasattr(module, "layer_idx"):
        return None
    linear = module._modules[parts.query]
    some = random_tensors(linear.weight.dtype)
    found: AttentionFormula | None = None
    for width in _widths(module, names):
        inputs = [some(2, TRIED_TOKENS, linear.in_features) * scale for scale in TRIED_SCALES]
        angles = random_angles(width, 2, TRIED_TOKENS, some) if width else None
        tried = [
            _tried(module, x, angles, names, caches[0], held) for x, held in itertools.product(inputs, TRIED_POSITIONS)
        ]
        trials = [one for one in tried if one is not None]
        if len(trials) < len(tried) or any(one.call.arguments != trials[0].call.arguments for one in trials):
            continue
        formulas = iter([found]) if found else _formulas(module, parts, width, names, caches[0], trials[0])
        for formula in formulas:
            if all(_repeats(module, formula, trial, kernels) for trial in trials):
                found = (
                    replace(formula, widths=(*(found.widths if found else ()), width)) if formula.widths else formula
                )
                break
    return found


def _widths(module: Any, names: tuple[str, ...]) -> list[int]:
    """The widths that cos and sin may have; 0 for a module that takes none."""
    if "position_embeddings" not in names:
        return [0]
    elements = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    if not isinstance(elements, int):
        return []
    shares = (1.0, 0.75, 0.5, 0.4, 0.25)  # of a head, in partial rotary embeddings
    return [width for share in shares if (width := int(elements * share)) % 2 == 0 and width > 0]


class Trial(NamedTuple):
    """A call of a module's own forward, and what came of it."""

    x: Tensor
    angles: tuple[Tensor, Tensor] | None
    cached: tuple[str, ...]
    call: Call
    output: Any


def _tried(module: Any, x: Tensor, angles: Any, names: tuple[str, ...], cache_name: str, held: int) -> Trial | None:
    """Calls the module's own forward. None where it does anything else with mask or cache than FusedAttention."""
    sequences, tokens, _ = x.shape
    mask = torch.ones(sequences, 1, tokens, tokens, dtype=torch.bool, device="cpu").tril()
    cache = ProbeCache(held)
    arguments = {"hidden_states": x, "attention_mask": mask, cache_name: cache}
    if angles is not None:
        arguments["position_embeddings"] = angles
    positions = torch.arange(held, held + tokens, device="cpu")
    if "cache_position" in names:
        arguments["cache_position"] = positions
    if "position_ids" in names or "kwargs" in names:
        arguments["position_ids"] = positions.expand(sequences, tokens)
    _recorded.made = []
    try:
        with _probing(module.config):
            output = module(**arguments)
        (call,) = _recorded.made
    except Exception:  # whatever a module raises that was not made for this
        return None
    finally:
        _recorded.made = []
    own = {name: value for name, value in call.arguments.items() if name not in arguments}
    if any(not isinstance(value, int | float | str | None) for value in own.values()):
        return None  # a tensor may differ from layer to layer
    if cache.given is None or cache.returned is None or call.mask is not mask:
        return None
    key, value, layer, more = cache.given
    passed_on = call.key is cache.returned[0] and call.value is cache.returned[1] and layer == module.layer_idx
    cached = tuple(more or ())
    if not passed_on or not set(cached) <= {"cos", "sin", *names}:
        return None
    return Trial(x, angles, cached, call._replace(key=key, value=value, arguments=own), output)


@contextmanager
def _probing(config: Any) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = PROBE
    try:
        yield
    finally:
        config._attn_implementation = before


def _formulas(
    module: Any, parts: Parts, width: int, names: tuple[str, ...], cache_name: str, trial: Trial
) -> Iterator[AttentionFormula]:
    call = trial.call
    elements = call.query.shape[3]
    query, key, value = (one.shape[1] * one.shape[3] for one in (call.query, call.key, call.value))
    factors = {1.0, float(getattr(module, "scaling", None) or 1.0)}
    pairs = ("halves", "neighbours", "none") if width else ("none",)
    for factor, rotating in itertools.product(sorted(factors, reverse=True), pairs):
        widths = (width,) if rotating != "none" else ()
        yield AttentionFormula(
            parts,
            elements,
            (query, key, value),
            factor,
            rotating,
            widths,
            names,
            cache_name,
            trial.cached,
            call.arguments,
        )


def _repeats(module: Any, formula: AttentionFormula, trial: Trial, kernels: dict[torch.dtype, AttentionInputs]) -> bool:
    """Whether the kernel computes what the module passed on, and the module returns what FusedAttention would."""
    output, call, x = trial.output, trial.call, trial.x
    if not isinstance(output, tuple) or len(output) != 2 or output[1] is not None:
        return False
    parts, elements = formula.parts, formula.elements
    held = [len(module._modules[name].weight) for name in dict.fromkeys((parts.query, parts.key, parts.value))]
    fits = held == list(formula.rows) or held == [sum(formula.rows)]
    if not fits or call.value.shape[3] != elements or any(one % elements for one in formula.rows):
        return False
    fused = FusedAttention()
    fused._modules = module._modules
    fused.__dict__.update(formula=formula, input_kernels=kernels)
    try:
        made = fused._inputs(x, trial.angles)
    except ValueError:  # the shapes of a norm
        return False
    expected = (call.query, call.key, call.value)
    if any(one.shape != other.shape for one, other in zip(made, expected, strict=True)):
        return False
    returned = module._modules[parts.output](call.attended.reshape(*x.shape[:-1], -1))
    same = all(same_but_for_rounding(one, other) for one, other in zip(made, expected, strict=True))
    return same and torch.equal(returned, output[0])
