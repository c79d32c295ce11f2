"""Finds the FFNs of a model by running it: by what its projections take and give, not by their names.

An FFN is a projection whose input is, neuron by neuron, a formula of the kernels (formulas.py) of what one or two other
projections gave for one input. What is found in one run is tested in a second one, in which the products are so large
that every limit of the formula acts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from flashclient.model.activations import FUNCTIONS, held_by, without_learned
from flashclient.recipes.ffns.formulas import PRODUCTS_MIN, Samples, limits_among, recognised
from flashclient.recipes.ffns.mixtures import experts_site, is_experts_call
from flashclient.recipes.ffns.site import Layer, Part, Rows, Site, scalars_of
from weightd_proto import weightd_pb2

ACTIVATION_NAMES = ("hidden_act", "hidden_activation", "activation_function", "ffn_act")  # fields of configs
BATCH = 2
TOKENS = 24
IDS = range(3, 200)  # of the tiny vocabulary, without its special tokens
BACK = 12  # calls of projections between the first and the last projection of an FFN


@dataclass
class _ProjectionCall:
    """One call of a projection."""

    name: str
    module: Any  # Linear or Conv1D
    x: Tensor  # [rows, inputs]
    y: Tensor  # [rows, outputs]

    @property
    def columns(self) -> bool:
        return isinstance(self.module, Conv1D)


@dataclass(frozen=True)
class _Found:
    """An FFN in the calls of a run: the calls' projections, and how gate and up lie in theirs."""

    down: str
    up: str
    gate: str | None
    layout: _Layout | None  # of a projection that gives both
    activation: weightd_pb2.Activation | None = None


@dataclass(frozen=True)
class _Layout:
    gate_first: bool
    interleaved: bool

    def split(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """(gate, up)"""
        first, second = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, dim=-1)
        return (first, second) if self.gate_first else (second, first)


_LAYOUTS = [_Layout(gate_first, interleaved) for interleaved in (False, True) for gate_first in (True, False)]


def run(model: PreTrainedModel, hooks: Sequence[RemovableHandle] = ()) -> Any:
    """The model's output for random ids. Removes `hooks` afterwards."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(IDS.start, IDS.stop, (BATCH, TOKENS), generator=generator)
    model.config.use_cache = False
    with torch.no_grad(), ExitStack() as removed:
        for hook in hooks:
            removed.enter_context(hook)
        return model(input_ids=ids)


@dataclass(frozen=True)
class SitesFound:
    """The FFNs of a model, in the order in which a forward pass calls them, and all modules that it calls."""

    sites: list[Site]
    called: set[str]


def watch(model: PreTrainedModel) -> SitesFound:
    """Finds the FFNs of `model`. Changes the scale of their weights."""
    calls = _record(model)
    found = _matches(model, calls)
    _enlarge(model, found, calls)
    calls = _record(model)
    found = [of for of in (_again(model, of, calls) for of in found) if of is not None]
    return _placed(model, found)


def unrecognised_because(model: PreTrainedModel) -> str:
    """Why `model` may have no FFN, as far as that can be told: as the end of an error."""
    if not bool(torch.isfinite(run(model).logits).all()):
        return "; a tiny instance of it computes numbers that are not finite: correct config.json"
    config: Any = model.config.get_text_config()
    named = [(name, getattr(config, name, None)) for name in ACTIVATION_NAMES]
    field, function = next(((name, of) for name, of in named if isinstance(of, str) and of in ACT2FN), ("", ""))
    if not function:
        return ""
    x = torch.linspace(-8, 8, 128, dtype=torch.float32)
    module = ACT2FN[function].float()
    with torch.no_grad():
        made = module(x)
    if recognised(Samples(None, x, made), lambda: scalars_of(module), held_by(module)) is not None:
        return ""
    return f"; its {field} is {function!r}, and kernels compute {', '.join(FUNCTIONS)}"


def _record(model: PreTrainedModel) -> list[_ProjectionCall]:
    calls: list[_ProjectionCall] = []

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            tensors = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(y, Tensor)
            if tensors and args[0].numel() and y.numel():  # shared experts may have no neurons
                calls.append(_ProjectionCall(name, module, _rows(args[0]).clone(), _rows(y).clone()))

        return keep

    hooks = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    run(model, hooks)
    return calls


def _rows(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])


def _matches(model: nn.Module, calls: list[_ProjectionCall]) -> list[_Found]:
    """The FFNs whose last projections are called for the first time after their first ones."""
    found: list[_Found] = []
    tried: set[str] = set()
    for index, down in enumerate(calls):
        if down.name not in tried:
            tried.add(down.name)
            match = _match(model, down, calls[max(0, index - BACK) : index])
            if match is not None:
                found.append(match)
    return found


def _match(model: nn.Module, down: _ProjectionCall, before: list[_ProjectionCall]) -> _Found | None:
    neurons = down.x.shape[1]
    alike = [call for call in reversed(before) if call.x.shape == down.y.shape]
    for up in alike:
        candidates = [_Found(down.name, up.name, None, None)] if up.y.shape[1] == neurons else []
        if up.y.shape[1] == 2 * neurons:
            candidates = [_Found(down.name, up.name, None, layout) for layout in _LAYOUTS]
        for candidate in candidates:
            activation = _activation(model, candidate, down, up, None)
            if activation is not None:
                return replace(candidate, activation=activation)
    pairs = [call for call in alike if call.y.shape[1] == neurons]
    for up, gate in itertools.permutations(pairs, 2):
        if torch.equal(gate.x, up.x):
            candidate = _Found(down.name, up.name, gate.name, None)
            activation = _activation(model, candidate, down, up, gate)
            if activation is not None:
                return replace(candidate, activation=activation)
    return None


def _again(model: nn.Module, of: _Found, calls: list[_ProjectionCall]) -> _Found | None:
    """`of` with the formula that all of its calls show, or None."""
    downs, ups, gates = ([call for call in calls if call.name == name] for name in (of.down, of.up, of.gate))
    if len(downs) != len(ups) or len(gates) not in (0, len(ups)):
        return None
    seen = set()
    activation = None
    for down, up, gate in itertools.zip_longest(downs, ups, gates):
        activation = _activation(model, of, down, up, gate)
        seen.add(None if activation is None else activation.SerializeToString())
    return None if activation is None or len(seen) > 1 else replace(of, activation=activation)


def _activation(
    model: nn.Module, of: _Found, down: _ProjectionCall, up: _ProjectionCall, gate: _ProjectionCall | None
) -> weightd_pb2.Activation | None:
    if len(down.x) != len(up.y) or (gate is not None and not torch.equal(gate.x, up.x)):
        return None
    products = (None if gate is None else gate.y, up.y) if of.layout is None else of.layout.split(up.y)
    host = model.get_submodule(_common(_names(of)))
    return recognised(Samples(*products, down.x), lambda: scalars_of(host), held_by(host))


def _common(names: tuple[str, ...]) -> str:
    """The path of the smallest module that has all of them."""
    paths = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _enlarge(model: nn.Module, found: list[_Found], calls: list[_ProjectionCall]) -> None:
    """Scales the first projections of FFNs so that their products pass every limit, and the last ones the other way."""
    by_name = {call.name: call for call in calls}
    for of in found:
        limits = limits_among(scalars_of(model.get_submodule(_common(_names(of)))))
        target = max([PRODUCTS_MIN, *(1.2 * limit for limit in limits)])
        first = [of.up] if of.gate is None else [of.gate, of.up]
        for name in first:
            by_name[name].module.weight.mul_(target / float(by_name[name].y.std()))
        gated = of.gate is not None or of.layout is not None
        by_name[of.down].module.weight.mul_(target**-2 if gated else 1 / target)


def _placed(model: PreTrainedModel, found: list[_Found]) -> SitesFound:
    """The sites, with the modules that they are put in, by one more run."""
    seen = _see(model)
    sites = {seen[of.up].order: _site(model, of, seen) for of in found}
    for name, calls in seen.items():
        module = model.get_submodule(name)
        if all(is_experts_call(module, *call.arguments) for call in calls.calls):
            site = experts_site(name, module, calls.calls[0].output.shape[-1])
            if site is not None:
                sites[calls.order] = site
    return SitesFound([sites[order] for order in sorted(sites)], set(seen))


def _names(of: _Found) -> tuple[str, ...]:
    return tuple(name for name in (of.gate, of.up, of.down) if name is not None)


@dataclass
class _ModuleCall:
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any = None


@dataclass
class _Seen:
    """The calls of one module in a run."""

    order: int  # of the first call
    calls: list[_ModuleCall] = field(default_factory=list)


def _see(model: PreTrainedModel) -> dict[str, _Seen]:
    """The calls of all modules that are called."""
    seen: dict[str, _Seen] = {}

    def before(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept = tuple(map(_kept, args)), {key: _kept(value) for key, value in kwargs.items()}
        seen.setdefault(name, _Seen(len(seen))).calls.append(_ModuleCall(kept))

    def after(name: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen[name].calls[-1].output = _kept(output)

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
        hooks.append(module.register_forward_hook(partial(after, name)))
    run(model, hooks)
    still = {name for name, _ in model.named_modules()}  # some models exchange modules when they are called
    return {name: calls for name, calls in seen.items() if name in still}


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _site(model: PreTrainedModel, of: _Found, seen: dict[str, _Seen]) -> Site:
    host = _common(_names(of))
    down: Any = model.get_submodule(of.down)
    hidden_size = seen[of.down].calls[0].output.shape[-1]
    is_alone = _is_alone(seen[host], seen[of.up], seen[of.down])
    return Site(
        module=host,
        place=Layer.MODULE if is_alone else Layer.PARTS,
        activation=without_learned(of.activation or weightd_pb2.Activation()),
        parts=(*_first_parts(model, of, host), _part(model, host, "down", of.down)),
        neurons=down.weight.numel() // hidden_size,
        hidden_size=hidden_size,
    )


def _is_alone(host: _Seen, first: _Seen, last: _Seen) -> bool:
    """Whether the module takes the input of the FFN alone, and returns the FFN's output."""
    if not len(host.calls) == len(first.calls) == len(last.calls):
        return False
    for call, first_call, last_call in zip(host.calls, first.calls, last.calls, strict=True):
        args, kwargs = call.arguments
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(call.output, Tensor):
            return False
        (x, *_), _ = first_call.arguments
        if call.output.shape != args[0].shape or not torch.equal(_rows(args[0]), _rows(x)):
            return False
        if not torch.equal(_rows(call.output), _rows(last_call.output)):
            return False
    return True


def _first_parts(model: nn.Module, of: _Found, host: str) -> Iterator[Part]:
    if of.layout is not None:
        blocks = {"gate": 0 if of.layout.gate_first else 1, "up": 1 if of.layout.gate_first else 0}
        for name, block in blocks.items():
            yield _part(model, host, name, of.up, block, of.layout.interleaved)
        return
    if of.gate is not None:
        yield _part(model, host, "gate", of.gate)
    yield _part(model, host, "up", of.up)


def _part(
    model: nn.Module, host: str, part: str, name: str, block: int | None = None, interleaved: bool = False
) -> Part:
    projection = model.get_submodule(name)
    below = name[len(host) + 1 :] if host else name
    # A Linear has a row for each output, Conv1D a column; neurons are outputs of the first projections.
    columns = isinstance(projection, Conv1D) != (part == "down")
    rows = Rows(f"{below}.weight", columns)
    if block is not None:
        rows = replace(rows, block=block, blocks=2, interleaved=interleaved)
    bias = None if projection.bias is None else replace(rows, parameter=f"{below}.bias", columns=False)
    return Part(part, rows, bias)
