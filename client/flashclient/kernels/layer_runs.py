"""Native layers of a step that are one native call.

A model calls its layers one after the other. Where it does nothing else with what they return than to call the next one
with it, a layer only notes what it is called with, and returns a tensor without values. When the loop over the layers
ends, one native call computes all that was noted, each layer into the tensor that it has returned. So between layers
there is no Python, whose caches are cold there, and the threads of the kernels need not be woken again.

That a model does nothing else is shown by running its own forward with other layers, which return tensors that nobody
may touch. What runs is interrupted where something may read a tensor before the end: before a layer that is not native
in this call, or has hooks. What was noted is computed first then, so every layer's bits are those of a call alone.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashclient._native import LayerCalls
from flashclient.kernels.growing_cache import GrowingCache, GrowingLayer, GrowingWindowLayer
from flashclient.kernels.trials import Native, hooked_everywhere, is_called_alone, native_class, random_tensors

ROWS_MAX = 16  # of a step: with more, a layer takes longer than what lies between two
TRIED_ARGUMENTS = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position"),
}


class LayerRun:
    """The native layers of a step that were called and not computed yet.

    Args:
        kind: the class of native layers.
        layers: what holds them; None for the run of a layer alone.
    """

    def __init__(self, kind: type[nn.Module], layers: nn.ModuleList | None = None) -> None:
        self.layers = layers
        self._kind = kind
        self._calls = LayerCalls()
        self._streamed: list[Any] = []
        self._rooms: list[tuple[Any, int]] = []  # of the cache, and the tokens that each gets
        self._last: Tensor | None = None  # what the layer that was noted last has returned
        self.known_inputs: dict[int, Any] = {}  # what layers found out about inputs of the form that this run has
        self._expected: nn.Module | None = None  # the layer that the loop is about to call
        self.error: BaseException | None = None  # of layers that were computed where the loop was left

    def walk(self, layers: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """What a loop over `layers` gets. At its end everything is computed."""
        try:
            for layer in layers:
                self._expected = layer if isinstance(layer, self._kind) and is_called_alone(layer) else None
                if self._expected is None or hooked_everywhere():
                    self._expected = None
                    self.compute()
                yield layer
        except GeneratorExit:  # the loop was left early; an exception would be lost here
            try:
                self.compute()
            except BaseException as error:
                self.error = error
            raise
        self._expected = None
        self.compute()

    def takes(self, layer: nn.Module, room: GrowingLayer | GrowingWindowLayer, rows: int) -> bool:
        """Whether a call of `layer` may wait for others. Otherwise all that wait are computed."""
        if layer is self._expected and rows <= ROWS_MAX and all(room is not one for one, _ in self._rooms):
            return True
        self.compute()
        return False

    def waits_for(self, x: Tensor) -> bool:
        """Whether x is what the layer before has returned, whose values are still to come."""
        return x is self._last

    def add(self, streamed: Any, room: GrowingLayer | GrowingWindowLayer, out: Tensor, *arguments: Any) -> None:
        """Notes a call.

        Args:
            streamed: has given the native FFN among the arguments.
            room: in which the tokens of `out` [sequences, tokens, hidden] will be written.
            out: what the layer returns.
            arguments: of LayerCalls.add().
        """
        self._calls.add(*arguments)
        self._streamed.append(streamed)
        self._rooms.append((room, out.shape[1]))
        self._last = out

    def compute(self) -> None:
        """Computes all that was noted. Raises what the FFNs raise; nothing is noted any more then."""
        if not self._streamed:
            return
        streamed, rooms = self._streamed, self._rooms
        self._streamed, self._rooms, self._last = [], [], None
        try:
            streamed[0].within([one.layer for one in streamed], self._calls.run)
        finally:
            self._calls.clear()
        for room, tokens in rooms:
            room.add_written(tokens)


class _Open(threading.local):
    """The run of the model that a thread is in."""

    def __init__(self) -> None:
        self.run: Any = None


_open = _Open()


def open_run() -> LayerRun | None:
    """The run that a layer called by this thread may join."""
    run: LayerRun | None = _open.run
    return run


@contextmanager
def _opened(run: Any) -> Iterator[None]:
    before, _open.run = _open.run, run
    try:
        yield
    finally:
        _open.run = before


class LayerList(nn.ModuleList):
    """The list of a model whose layers may be one call."""

    def __iter__(self) -> Iterator[nn.Module]:
        run = None if torch.compiler.is_compiling() else _open.run
        if run is None or run.layers is not self:
            return super().__iter__()
        walked: Iterator[nn.Module] = run.walk(list(self._modules.values()))
        return walked

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and not torch.compiler.is_compiling():
            run = _open.run
            if run is not None and run.layers is self:
                return _SomeLayers(list(self._modules.values())[index])
        return super().__getitem__(index)


class _SomeLayers(list[nn.Module]):
    """Some layers of the model that this thread is in."""

    def __iter__(self) -> Iterator[nn.Module]:
        layers = list(super().__iter__())
        run = _open.run
        return iter(layers) if run is None else run.walk(layers)


class NativeStack(Native):
    """The forward pass of a model whose layers may be one call. Other cases are left to the class that it had."""

    stack_layers: str  # the name of their list
    stack_names: tuple[str, ...]  # of the arguments of the forward that it had
    stack_forward: Any  # that forward
    stack_kind: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layers = self._modules.get(self.stack_layers)
        if not isinstance(layers, LayerList) or not self._may_run(args, kwargs):
            return super().forward(*args, **kwargs)
        run = LayerRun(self.stack_kind, layers)
        with _opened(run):
            output = super().forward(*args, **kwargs)
        if run.error is not None:
            raise run.error
        return output

    def _may_run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch._C._len_torch_function_stack():
            return False
        # A flag that is off asks for nothing: mixtures are called with output_router_logits=False.
        asked = (name for name, value in kwargs.items() if value is not None and value is not False)
        given = (*self.stack_names[: len(args)], *asked)
        known = len(args) <= len(self.stack_names) and all(name in TRIED_ARGUMENTS for name in given)
        return known and not self.training and _forward_of(self) is self.stack_forward


def _forward_of(stack: nn.Module) -> Any:
    """The forward of the class that a native stack had, or that another module has."""
    kinds = [one for one in type(stack).__mro__ if not issubclass(one, NativeStack)]
    return next(vars(one)["forward"] for one in kinds if "forward" in vars(one))


def use_layer_runs(model: nn.Module, kind: type[nn.Module]) -> int:
    """Makes the native layers of `model` one call in small steps, where it calls them one after the other.

    Args:
        kind: the class of native layers.

    Returns:
        The number of modules with such layers.
    """
    changed = 0
    for stack in list(model.modules()):
        lists = [
            name
            for name, one in stack.named_children()
            if type(one) is nn.ModuleList and any(isinstance(layer, kind) for layer in one)
        ]
        if len(lists) == 1 and isinstance(stack, PreTrainedModel) and not isinstance(stack, NativeStack):
            changed += _made_native(stack, lists[0], kind)
    return changed


def _made_native(stack: Any, name: str, kind: type[nn.Module]) -> bool:
    layers: Any = stack._modules[name]
    forward = _forward_of(stack)
    names = tuple(one for one in inspect.signature(forward).parameters if one != "self")
    before: Any = type(layers)
    kind_before: Any = type(stack)
    layers.__class__ = native_class(LayerList, before)
    if not _calls_in_order(stack, layers):
        layers.__class__ = before
        return False
    stack.__class__ = native_class(NativeStack, kind_before)
    stack.__dict__.update(stack_layers=name, stack_names=names, stack_forward=forward, stack_kind=kind)
    return True


class _LoopEnded(Exception):
    """Ends a trial where the loop over the layers ends."""


class _Untouched(Tensor):
    """What a layer returns in a trial: to be passed on, and nothing else."""

    touched = False

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("a tensor between two layers is used")


class _TrialRun:
    """Stands for a LayerRun."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        self.called: list[nn.Module] = []
        self.passed: Any = None  # what the last layer returned
        self.in_order = True

    def walk(self, layers: Sequence[nn.Module]) -> Iterator[nn.Module]:
        for number, layer in enumerate(layers, 1):
            yield layer
            self.in_order = self.in_order and len(self.called) == number and self.called[-1] is layer
        raise _LoopEnded

    def instead(self, layer: nn.Module) -> Any:
        """A forward that notes the call of `layer`."""

        def forward(hidden_states: Tensor, **_: Any) -> Tensor:
            self.in_order = self.in_order and (self.passed is None or hidden_states is self.passed)
            self.called.append(layer)
            self.passed = torch.empty(1, dtype=torch.float32, device="cpu").as_subclass(_Untouched)
            made: Tensor = self.passed
            return made

        return forward


def _calls_in_order(stack: Any, layers: nn.ModuleList) -> bool:
    """Whether the loop over the layers calls each with what the one before returned, and does nothing else with it."""
    embedding = stack.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if weight is None:
        return False
    some = random_tensors(stack.dtype)
    for tokens, held in ((1, 0), (3, 0), (1, 2)):
        cache = GrowingCache(stack.config) if held or tokens > 1 else None
        mask = torch.ones(1, tokens, dtype=torch.int64, device="cpu") if cache is None or tokens > 1 else None
        run = _TrialRun(layers)
        given = {"inputs_embeds": some(1, tokens, weight.shape[1]), "attention_mask": mask, "past_key_values": cache}
        if not _passes(stack, run, given):
            return False
    return True


def _passes(stack: Any, run: _TrialRun, given: dict[str, Any]) -> bool:
    layers = list(run.layers._modules.values())
    for layer in layers:
        layer.__dict__["forward"] = run.instead(layer)
    try:
        with torch.no_grad(), _opened(run):
            type(stack).forward(stack, use_cache=given["past_key_values"] is not None, **given)
    except _LoopEnded:
        return run.in_order and run.called == layers
    except Exception:  # whatever a model raises that was not made for this
        return False
    finally:
        for layer in layers:
            del layer.__dict__["forward"]
    return False
