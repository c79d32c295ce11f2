"""A decoder layer that is one native call: attention, norms, residual sums, and the FFN where it is streamed.

A mixture is one of these where its block is nothing but a router and experts (mixtures.py). Any other FFN is called as
before, between two native calls.

A layer becomes native if it is one of these, with norms where it has them, and its attention is a FusedAttention:

    sum = x + after(attention(before(x))); y = sum + after_ffn(ffn(before_ffn(sum)))

This is shown by running the layer's own forward, with another function in the place of the FFN: it must return the same
bits. So a layer may leave the native way for one call, where a hook or another kind of cache needs its own forward, and
no bit changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashclient._native import AttentionBlock, AttentionBlocks, AttentionProjection, Workers
from flashclient.kernels.arrays import KernelOf, array_of
from flashclient.kernels.decode_attention import UNSUPPORTED
from flashclient.kernels.dtypes import KERNEL_DTYPES
from flashclient.kernels.encoded_matrix import matrix_of
from flashclient.kernels.fused_attention import TRIED_ARGUMENTS, TRIED_SCALES, TRIED_TOKENS, FusedAttention
from flashclient.kernels.growing_cache import GrowingLayer, GrowingWindowLayer, Int8Layer, Int8WindowLayer
from flashclient.kernels.layer_runs import LayerRun, open_run, use_layer_runs
from flashclient.kernels.mixtures import Mixture, mixture_of
from flashclient.kernels.resident_linear import BIAS_DTYPES, ResidentLinear
from flashclient.kernels.resident_norm import NativeNorm
from flashclient.kernels.trials import (
    Native,
    SeenModules,
    has_tensors,
    hooked_everywhere,
    is_called_alone,
    is_plain,
    make_native,
    native_class,
    random_angles,
    random_tensors,
    scalars,
)

Room = GrowingLayer | GrowingWindowLayer

KNOWN_ARGUMENTS = {"dropout", "scaling", "sliding_window"}  # of attention; a window is in the mask or the cache


@dataclass(frozen=True)
class Wiring:
    """The children of a layer by what they are for; None where it has no such norm. `ffn` is a path."""

    attention: str
    ffn: str
    before: str | None
    after: str | None
    before_ffn: str | None
    after_ffn: str | None

    @cached_property
    def norms(self) -> list[str]:
        """All of them."""
        return [one for one in (self.before, self.after, self.before_ffn, self.after_ffn) if one is not None]


@dataclass(frozen=True)
class HeldBlock:
    """A native block, and what it was made of.

    Attributes:
        modules: that it stands for; the first is the attention.
        pointers: of their weights.
        elements: of a head.
        seen: the modules and their weights.
    """

    block: AttentionBlock
    modules: list[nn.Module]
    pointers: list[int]
    dtype: torch.dtype
    heads: int
    key_heads: int
    elements: int
    rotates: bool
    seen: SeenModules


class NativeDecoderLayer(Native):
    """The forward pass of a layer that became native. Other cases are left to the class that it had."""

    wiring: Wiring
    names: tuple[str, ...]  # of the arguments of the forward that it had
    untried: tuple[str, ...]  # those that no trial has given it
    block_kernels: dict[torch.dtype, AttentionBlocks]
    ffn_kind: type[nn.Module]  # of modules that stream an FFN
    mixture: Mixture | None = None  # what the FFN is, if it is one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        traced = torch.compiler.is_compiling() or len(args) > len(self.names)
        way = None if traced else self.way_of(call)
        run = None if traced else open_run()
        streamed = None if way is None else self._streamed(call["hidden_states"])
        out = None if way is None or streamed is None else self._whole(*way, call, streamed, run)
        if out is not None:
            return out
        if run is not None:
            run.compute()  # the layers before this one
        return super().forward(*args, **kwargs) if way is None else self._in_parts(*way, call, streamed)

    def _in_parts(self, held: HeldBlock, room: Room, call: dict[str, Any], streamed: Any) -> Tensor:
        """The output of the layer by two native calls, with that of the FFN between them."""
        norm = self._norm_after_ffn()
        if streamed is None:
            total, ffn_input = self._attend(held, call, room, held.dtype)
            y: Tensor = self.get_submodule(self.wiring.ffn)(ffn_input)
            return total + (y if norm is None else norm(y))
        total, ffn_input = self._attend(held, call, room, torch.float32)
        y = streamed.of_rows(ffn_input.view(-1, ffn_input.shape[-1]))
        out = torch.empty_like(total)
        after = None if norm is None else norm.native_norm()
        self.block_kernels[held.dtype].finish(array_of(y), after, array_of(total), array_of(out))
        return out

    def _norm_after_ffn(self) -> Any:
        return None if self.wiring.after_ffn is None else self._modules[self.wiring.after_ffn]

    def way_of(self, call: dict[str, Any]) -> tuple[HeldBlock, Room] | None:
        """The native block, and the layer of the cache to write to. None where the native way is not for this call."""
        held = self._held_block(call)
        room = None if held is None else self._room(held, call)
        return None if held is None or room is None else (held, room)

    def _streamed(self, x: Tensor) -> Any:
        """What computes the FFN within this layer; None where the FFN must be called."""
        if torch.is_grad_enabled() or torch._C._len_torch_function_stack():
            return None
        ffn: Any = self._modules.get(self.wiring.ffn)  # mostly; get_submodule() takes much longer
        if ffn is None:
            ffn = self.get_submodule(self.wiring.ffn)
        if isinstance(ffn, self.ffn_kind):
            streamed: Any = ffn.streamed
            return streamed if is_called_alone(ffn) else None
        return None if self.mixture is None else self.mixture.streamed(ffn, x)

    def _whole(
        self, held: HeldBlock, room: Room, call: dict[str, Any], streamed: Any, run: LayerRun | None
    ) -> Tensor | None:
        """The output of the layer by one native call, which others may share: its values come with the run then.

        None where the FFN must be called, and nothing was done.
        """
        x: Tensor = call["hidden_states"]
        rows = x.shape[0] * x.shape[1]
        ffn = streamed.native(rows)
        if ffn is None:
            return None
        joined = run if run is not None and run.takes(self, room, rows) else None
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        norm = self._norm_after_ffn()
        after = None if norm is None else norm.native_norm()
        calls = joined or LayerRun(type(self))
        arguments = self._arguments(held, call, room, ffn, after, array_of(out))
        calls.add(streamed, room, out, self.block_kernels[held.dtype], *arguments)
        if joined is None:
            calls.compute()
        return out

    def _attend(
        self, held: HeldBlock, call: dict[str, Any], room: Room, ffn_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The sum of x and the attention, and what the FFN takes, both [sequences, tokens, hidden]."""
        x: Tensor = call["hidden_states"]
        total = torch.empty_like(x, memory_format=torch.contiguous_format)
        ffn_input = torch.empty_like(total, dtype=ffn_dtype)
        outputs = array_of(total), array_of(ffn_input)
        self.block_kernels[x.dtype].compute(*self._arguments(held, call, room, *outputs))
        room.add_written(x.shape[1])
        return total, ffn_input

    def _arguments(self, held: HeldBlock, call: dict[str, Any], room: Room, *more: Any) -> tuple[Any, ...]:
        """What a call of the native block computes on, and more arguments after that."""
        x: Tensor = call["hidden_states"].detach().contiguous()
        tokens = x.shape[1]
        rooms = room.room_now(x.shape[0], tokens)
        if rooms is None:
            new = room.none_of(x, held.key_heads, held.elements)
            rooms = room.room_for(tokens, new, new)
        keys, values = map(array_of, rooms)
        begin, before = room.held_at
        cos, sin = map(array_of, call["position_embeddings"]) if held.rotates else (None, None)
        mask = call.get("attention_mask")
        attention: Any = held.modules[0]
        causal = mask is None and tokens > 1 and attention.is_causal
        masked = None if mask is None else array_of(mask)
        return held.block, array_of(x), cos, sin, keys, values, begin, before, masked, causal, *more

    def _held_block(self, call: dict[str, Any]) -> HeldBlock | None:
        """The native block with the weights that the layer has now. None where it does not compute this call."""
        wiring, x = self.wiring, call.get("hidden_states")
        attention: Any = self._modules[wiring.attention]
        if x is None or self.training or not isinstance(attention, FusedAttention) or attention.training:
            return None
        if hooked_everywhere() or any(call.get(name) not in (None, False) for name in self.untried):
            return None
        held: HeldBlock | None = self.__dict__.get("_held")
        if held is not None and not torch.is_grad_enabled() and held.seen.are_unchanged():
            return held if held.dtype == x.dtype and self._takes(attention, x, call) else None
        places = [(self._modules, one) for one in (wiring.attention, *wiring.norms)]
        places += ((attention._modules, one) for one in attention.formula.parts.names)
        modules: list[Any] = [children[name] for children, name in places]
        pointers: list[int] = []
        for module in modules:
            if not is_called_alone(module):
                return None
            pointers += (one.data_ptr() for one in module._parameters.values() if one is not None)
        changed = held is None or held.pointers != pointers or held.modules != modules
        if (changed or torch.is_grad_enabled()) and not self._is_plain(attention, x):
            return None
        if held is None or changed:
            held = self.__dict__["_held"] = self._made(attention, modules, pointers, x.dtype, places)
        return held if held.dtype == x.dtype and self._takes(attention, x, call) else None

    def _takes(self, attention: FusedAttention, x: Tensor, call: dict[str, Any]) -> bool:
        """Whether the kernels take this input. Layers of a run have inputs of one form, so one of them is looked at."""
        run, embeddings = open_run(), call.get("position_embeddings")
        if run is None or not run.waits_for(x):
            return attention.takes(x, embeddings)
        known = run.known_inputs
        found = known.get(id(embeddings))
        widths, config = attention.formula.widths, attention.config
        if found is None or found[:2] != (widths, config) or not found[3]:
            found = known[id(embeddings)] = (widths, config, embeddings, attention.takes(x, embeddings))
        return found[3]

    def _is_plain(self, attention: FusedAttention, x: Tensor) -> bool:
        """Whether the weights are as the kernels take them, and need no gradient."""
        output = attention._modules[attention.formula.parts.output]
        norms = [self._modules[one] for one in self.wiring.norms]
        return (
            attention.is_plain(x)
            and is_plain(output, ResidentLinear, x, BIAS_DTYPES)
            and all(is_plain(one, NativeNorm, x) for one in norms)
        )

    def _made(
        self, attention: Any, modules: list[Any], pointers: list[int], dtype: torch.dtype, places: list[Any]
    ) -> HeldBlock:
        wiring, formula = self.wiring, attention.formula
        output: Any = attention._modules[formula.parts.output]
        bias = None if output.bias is None else array_of(output.bias)
        (query, rows), (key, key_rows), (value, _) = attention.projections()

        def norm(name: str | None) -> Any:
            module: Any = None if name is None else self._modules[name]
            return None if module is None else module.native_norm()

        block = AttentionBlock(
            query,
            key,
            value,
            AttentionProjection(matrix_of(output.weight), bias, None),
            norm(wiring.before),
            norm(wiring.after),
            norm(wiring.before_ffn),
            formula.pairs,
            formula.elements,
            float(formula.arguments["scaling"]),
        )
        elements = formula.elements
        shape = (rows // elements, key_rows // elements, elements, bool(formula.widths))
        return HeldBlock(block, modules, pointers, dtype, *shape, SeenModules(places))

    def _room(self, held: HeldBlock, call: dict[str, Any]) -> Room | None:
        attention: Any = held.modules[0]
        x, mask = call["hidden_states"], call.get("attention_mask")
        if call.get("is_causal") is not None or any(call.get(name) not in (None, False) for name in UNSUPPORTED):
            return None
        room: Any = self._layer_of_cache(call.get(attention.formula.cache), attention.layer_idx)
        if room is None or (torch.is_grad_enabled() and room.is_initialized and room.keys.requires_grad):
            return None
        if mask is not None:
            if mask.dtype != torch.bool or mask.dim() != 4 or not mask.is_cpu:
                return None
            fits = mask.shape[0] in (1, x.shape[0]) and mask.shape[1] in (1, held.heads)
            if not fits or mask.shape[2:] != (x.shape[1], room.held_at[1] + x.shape[1]):
                return None
        found: Room = room
        return found

    def _layer_of_cache(self, cache: Any, index: int) -> Any:
        if cache is None:
            return GrowingLayer()  # type: ignore[no-untyped-call]
        layers = getattr(cache, "layers", None)
        if not isinstance(layers, list) or index >= len(layers):
            return None
        grows = type(layers[index]) in (GrowingLayer, GrowingWindowLayer, Int8Layer, Int8WindowLayer)
        return layers[index] if grows and not getattr(layers[index], "record_past", False) else None


def use_native_layers(
    model: PreTrainedModel,
    workers: Workers,
    ffn_kind: type[nn.Module],
    experts_kind: type[nn.Module] | None = None,
    instruction_set: str | None = None,
) -> int:
    """Makes every decoder layer of `model` native that is one of those above. After use_fused_attention().

    Args:
        workers: shared with the other kernels.
        ffn_kind: the class of modules that compute a whole FFN, though other modules hold its parts.
        experts_kind: the class of modules that stream experts.
        instruction_set: of the names in native/kernels/kernels.h; None takes the best.

    Returns:
        The number of modules changed.

    Raises:
        ValueError: the processor does not have `instruction_set`.
    """
    kernels = KernelOf({one: AttentionBlocks(workers, name, instruction_set) for one, name in KERNEL_DTYPES.items()})
    changed = make_native(model, NativeDecoderLayer, _key, lambda module: _found(module, ffn_kind, kernels))
    for layer in model.modules():
        if isinstance(layer, NativeDecoderLayer) and experts_kind is not None:
            layer.__dict__["mixture"] = mixture_of(layer.get_submodule(layer.wiring.ffn), experts_kind)
    use_layer_runs(model, NativeDecoderLayer)
    return changed


def _attention_of(module: nn.Module) -> str | None:
    """The name of the only native attention among the children."""
    names = [name for name, child in module.named_children() if isinstance(child, FusedAttention)]
    return names[0] if len(names) == 1 else None


def _key(module: nn.Module) -> str | None:
    """What may make two layers compute different things, but for the values of their weights; None: it is no layer."""
    kinds = [(name, type(child).__name__, getattr(child, "formula", None)) for name, child in module.named_children()]
    return None if _attention_of(module) is None else str((type(module), scalars(module), kinds))


class TrialCache:
    """A cache of one layer."""

    def __init__(self, index: int) -> None:
        self.layers = [GrowingLayer() for _ in range(index + 1)]  # type: ignore[no-untyped-call]

    def update(self, key: Tensor, value: Tensor, index: int, *_: Any) -> tuple[Tensor, Tensor]:
        return self.layers[index].update(key, value)

    def get_seq_length(self, index: int = 0) -> int:
        return self.layers[index].get_seq_length()


def _found(module: Any, ffn_kind: type[nn.Module], kernels: Any) -> dict[str, Any] | None:
    """The attributes of the native layer. Its wiring is shown with other weights in its norms: no two are alike."""
    name = _attention_of(module)
    assert name is not None  # _key() has seen it
    attention = module._modules[name]
    arguments = attention.formula.arguments
    ffn = _ffn_of(module, name, ffn_kind)
    norms = [norm for norm, child in module.named_children() if isinstance(child, NativeNorm)]
    known = set(arguments) <= KNOWN_ARGUMENTS and isinstance(arguments.get("scaling"), float)
    if ffn is None or len(norms) > 4 or not known or module._parameters or has_tensors(module):
        return None
    with _trial(module, ffn, norms):
        try:
            expected = _passes(module, attention)
        except Exception:  # whatever a module raises that was not made for this
            return None
        before: Any = type(module)
        names = tuple(one for one in inspect.signature(before.forward).parameters if one != "self")
        untried = tuple(one for one in names if one not in TRIED_ARGUMENTS and one != attention.formula.cache)
        held = {"names": names, "untried": untried, "block_kernels": kernels, "ffn_kind": ffn_kind}
        for wiring in _wirings(name, ffn, norms):
            module.__class__ = native_class(NativeDecoderLayer, before)
            module.__dict__.update(held, wiring=wiring)
            try:
                if _same(_passes(module, attention), expected):
                    return held | {"wiring": wiring}
            except (ValueError, RuntimeError):  # shapes that do not fit
                continue
            finally:
                module.__class__ = before
                for attribute in (*held, "wiring", "_held"):
                    module.__dict__.pop(attribute, None)
    return None


def _passes(module: Any, attention: Any) -> list[Any]:
    """What a layer returns for a prompt, and for tokens after it with a mask; small inputs, then large ones.

    Raises:
        ValueError: the layer is native, and goes its own way.
    """
    weight: Tensor = attention._modules[attention.formula.parts.query].weight
    some = random_tensors(weight.dtype)
    made = []
    for scale in TRIED_SCALES:
        cache = TrialCache(attention.layer_idx)
        allowed = torch.ones(2, 1, 2, TRIED_TOKENS + 2, dtype=torch.bool, device="cpu").tril(1)
        for tokens, mask in ((TRIED_TOKENS, None), (2, allowed)):
            call: dict[str, Any] = {"hidden_states": some(2, tokens, weight.shape[1]) * scale}
            call |= {"attention_mask": mask, attention.formula.cache: cache}
            if attention.formula.widths:
                call["position_embeddings"] = random_angles(max(attention.formula.widths), 2, tokens, some)
            if isinstance(module, NativeDecoderLayer) and module.way_of(call) is None:
                raise ValueError("not native")
            made.append(module(**call))
    return made


def _same(made: list[Any], expected: list[Any]) -> bool:
    pairs = zip(made, expected, strict=True)  # a layer of an older transformers may return a tuple
    return all(
        isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other) for one, other in pairs
    )


def _ffn_of(module: nn.Module, attention: str, ffn_kind: type[nn.Module]) -> str | None:
    """The path of the module that is the FFN: the only other child with weights, or the only one of its kind."""
    others = [
        name
        for name, child in module.named_children()
        if name != attention
        and not isinstance(child, NativeNorm)
        and (next(child.parameters(), None) is not None or any(isinstance(one, ffn_kind) for one in child.modules()))
    ]
    if len(others) == 1:
        return others[0]
    if not all(one.is_meta for name in others for one in module.get_submodule(name).parameters()):
        return None
    streamed = [path for path, one in module.named_modules() if isinstance(one, ffn_kind)]
    return streamed[0] if len(streamed) == 1 else None


@contextmanager
def _trial(module: nn.Module, ffn: str, norms: list[str]) -> Iterator[None]:
    """While another function is in the place of the FFN, and the norms have random weights."""

    def instead(x: Tensor) -> Tensor:
        return x.flip(-1) * 0.5

    part = module.get_submodule(ffn)
    function: Callable[[Tensor], Tensor] = instead
    part.__dict__["forward"] = function
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    for number, name in enumerate(norms):
        norm = module.get_submodule(name)
        for attribute, weight in norm._parameters.items():
            if weight is not None:
                kept.append((norm, attribute, weight))
                random = random_tensors(weight.dtype, seed=number + 1)(*weight.shape)
                norm._parameters[attribute] = nn.Parameter(random, requires_grad=False)
    try:
        yield
    finally:
        del part.__dict__["forward"]
        for norm, attribute, weight in kept:
            norm._parameters[attribute] = weight
            norm.__dict__.pop("_held", None)


def _wirings(attention: str, ffn: str, norms: list[str]) -> Iterator[Wiring]:
    """Every way to use all of the norms, those of pre-norm layers first."""
    places = len(norms)
    for used in ((True, False, True, False), (True, True, True, True), (False, True, False, True)):
        if sum(used) != places:
            continue
        for order in permutations(norms):
            names = iter(order)
            yield Wiring(attention, ffn, *(next(names) if one else None for one in used))
