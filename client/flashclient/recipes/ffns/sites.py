"""The FFNs of a full-size model: those of its tiny instance, carried over by what their modules are.

The full model is on the meta device: its modules and shapes are there, and its weights take no memory.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from flashclient.errors import ModelError, some
from flashclient.recipes.ffns.site import NO_SIZE, Layer, Part, Site
from flashclient.recipes.ffns.tiny import LAYERS_MIN, one_line
from weightd_proto import weightd_pb2

LAYERS_MAX = 12  # of a tiny model

Signature = tuple[Any, ...]


@dataclass(frozen=True)
class Streamed:
    """What of a model is streamed.

    Attributes:
        sites: all of one layout and activation, in the order in which a forward pass calls them.
        others: sites that differ in layout or activation; they stay resident.
        unrecognised: modules of a site's class that compute something else; they stay resident too.
        resident_share: of the weights, tied ones counted once.
    """

    sites: tuple[Site, ...]
    others: tuple[Site, ...]
    unrecognised: tuple[str, ...]
    resident_share: float

    def notes(self) -> Iterator[str]:
        """What stays resident though it is an FFN, one line each."""
        if self.others:
            others = some([site.module for site in self.others], 3)
            yield f"FFNs of another layout or activation than most stay in memory: {others}"
        if self.unrecognised:
            yield f"FFNs that compute something else than the others stay in memory: {some(self.unrecognised, 3)}"
        if self.others or self.unrecognised:
            yield f"{self.resident_share:.0%} of the weights stay in memory"

    def computing(self, activation: weightd_pb2.Activation) -> Streamed:
        """The same, with another activation."""
        return replace(self, sites=tuple(replace(site, activation=activation) for site in self.sites))


def weightless(found: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model of `config` on the meta device. Raises ModelError where its class cannot be made from it."""
    try:
        with torch.device("meta"), no_init_weights():
            model: PreTrainedModel = found._from_config(copy.deepcopy(config))  # type: ignore[no-untyped-call]
    except Exception as error:  # transformers' classes raise anything for a config of unknown origin
        raise ModelError(f"config.json: {found.__name__} cannot be made: {one_line(error)}") from error
    return model


def layers_needed(model: nn.Module) -> int:
    """How many layers a tiny model needs to have every kind of layer of `model`, if it has the first ones."""
    needed = LAYERS_MIN
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            kinds = [signature(layer) for layer in module]
            needed = max(needed, 1 + max((kinds.index(kind) for kind in set(kinds)), default=0))
    return min(needed, LAYERS_MAX)


def signature(module: nn.Module) -> Signature:
    """What decides what a module computes, apart from its sizes and weights."""
    if isinstance(module, nn.ModuleList):
        return ("ModuleList", frozenset(signature(of) for of in module))
    parts = tuple((name, signature(of)) for name, of in module.named_children())
    return (*_own(module), parts)


def _own(module: nn.Module) -> Signature:
    values = {name: _decisive(name, value) for name, value in vars(module).items() if name[0] != "_"}
    names = tuple((name, value.dim()) for name, value in module.named_parameters(recurse=False))
    decisive = tuple(sorted((name, value) for name, value in values.items() if value is not None))
    return (f"{type(module).__module__}.{type(module).__qualname__}", names, decisive)


def _decisive(name: str, value: Any) -> str | None:
    if name == "training":
        return None
    if isinstance(value, bool | float | str) or (isinstance(value, int) and NO_SIZE.search(name)):
        return repr(float(value) if type(value) is int else value)
    if isinstance(value, functools.partial):
        return f"{_name(value.func)} {value.args} {value.keywords}"
    return _name(value) if callable(value) and not isinstance(value, type) else None


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _of_site(model: nn.Module, site: Site) -> Signature:
    return of_place(model.get_submodule(site.module), site.place, [part.rows.parameter for part in site.parts])


def of_place(module: nn.Module, place: Layer.Place, weights: Sequence[str]) -> Signature:
    """The signature of a site's module. One that does more than the FFN counts with its parts and its own values."""
    if place != Layer.PARTS:
        return signature(module)
    parts = tuple(signature(module.get_submodule(name.rpartition(".")[0])) for name in weights)
    others = tuple((name, type(of).__qualname__) for name, of in module.named_children())
    functions = [(name, of) for name, of in module.named_children() if next(of.parameters(), None) is None]
    return (*_own(module), parts, others, tuple((name, signature(of)) for name, of in functions))


def carried(tiny: nn.Module, found: Sequence[Site], called: Iterable[str], full: nn.Module) -> list[Site]:
    """The sites of `full`: where a module is what one of `tiny` is, all of whose calls were the site's formula.

    Args:
        tiny: on the meta device: a model that has run can have changed what its modules hold.
        found, called: of a watched instance of it.
    """
    known: dict[tuple[str, Layer.Place, tuple[str, ...]], dict[Signature, list[Site]]] = {}
    for site in found:
        host = tiny.get_submodule(site.module)
        weights = tuple(part.rows.parameter for part in site.parts)
        key = (type(host).__qualname__, site.place, weights)
        known.setdefault(key, {}).setdefault(_of_site(tiny, site), []).append(site)
    proven = {(site.module, tuple(part.rows.parameter for part in site.parts)) for site in found}
    modules = dict(tiny.named_modules(remove_duplicate=False))
    for name in set(called) & set(modules):  # some models exchange modules when they are called
        for (kind, place, weights), by_signature in known.items():
            module = modules[name]
            if type(module).__qualname__ == kind and (name, weights) not in proven:
                by_signature.pop(of_place(module, place, weights), None)
    sites = []
    for name, module in full.named_modules(remove_duplicate=True):
        for (kind, place, weights), by_signature in known.items():
            if type(module).__qualname__ == kind:
                alike = by_signature.get(of_place(module, place, weights), [])
                if len({(site.parts, site.activation.SerializeToString()) for site in alike}) == 1:
                    sites.append(_sized(name, module, alike[0]))
    order = _order(found)
    return sorted(sites, key=lambda site: order(site.module))


def _sized(path: str, module: nn.Module, site: Site) -> Site:
    """`site` with the sizes of `module`."""
    down = module.get_parameter(site.parts[-1].rows.parameter)
    parts = tuple(_with_experts(part, len(down) if site.experts else 0) for part in site.parts)
    neurons, hidden_size = parts[-1].rows.of(down).shape[-2:]
    return replace(
        site,
        module=path,
        parts=parts,
        neurons=neurons,
        hidden_size=hidden_size,
        experts=len(down) if site.experts else 0,
    )


def _with_experts(part: Part, experts: int) -> Part:
    bias = None if part.bias is None else replace(part.bias, experts=experts)
    return replace(part, rows=replace(part.rows, experts=experts), bias=bias)


def _order(found: Sequence[Site]) -> Callable[[str], tuple[int, ...]]:
    """Sorts paths like the calls of `found`: by layer, then as the names below were first called."""
    ranks: dict[tuple[str, ...], int] = {}
    for rank, site in enumerate(found):
        path = generic(site.module)
        for end in range(1, len(path) + 1):
            ranks.setdefault(path[:end], rank)

    def key(path: str) -> tuple[int, ...]:
        names, starred = path.split("."), generic(path)
        ranked = [ranks.get(starred[:end], len(found)) for end in range(1, len(names) + 1)]
        return tuple(int(name) if name.isdigit() else rank for name, rank in zip(names, ranked, strict=True))

    return key


def generic(path: str) -> tuple[str, ...]:
    """The path with a star for each number."""
    return tuple("*" if name.isdigit() else name for name in path.split("."))


def streamed(full: nn.Module, sites: Sequence[Site]) -> Streamed:
    """Chooses the layout that most of the weights have."""
    sizes: Counter[tuple[Any, ...]] = Counter()
    for site in sites:
        sizes[_layout(site)] += values_of(site)
    chosen = max(sizes, key=lambda layout: sizes[layout], default=None)
    taken = [site for site in sites if _layout(site) == chosen]
    total = sum(parameter.numel() for parameter in full.parameters())
    return Streamed(
        tuple(taken),
        tuple(site for site in sites if _layout(site) != chosen),
        _unrecognised(full, sites),
        1 - sum(map(values_of, taken)) / total,
    )


def _unrecognised(full: nn.Module, sites: Sequence[Site]) -> tuple[str, ...]:
    paths = {site.module for site in sites}
    classes = {type(full.get_submodule(site.module)) for site in sites if site.place != Layer.PARTS}
    return tuple(name for name, module in full.named_modules() if type(module) in classes and name not in paths)


def _layout(site: Site) -> tuple[Any, ...]:
    return (site.hidden_size, tuple(site.names()), site.activation.SerializeToString(deterministic=True))


def values_of(site: Site) -> int:
    """Numbers in the matrices of a site."""
    return len(site.parts) * site.neurons * max(1, site.experts) * site.hidden_size
