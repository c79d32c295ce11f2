"""Finds the experts of mixtures: modules that are called with an input, the experts of each token, and their weights.

In transformers' experts interface (integrations/moe.py) some sixty families call their experts like this. What the
parameters of such a module are is found from their shapes and from what the module computes, not from its names.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flashclient.model.activations import held_by, without_learned
from flashclient.recipes.ffns.formulas import PRODUCTS_MIN, Samples, limits_among, made_by, recognised
from flashclient.recipes.ffns.site import Layer, Part, Rows, Site, scalars_of
from weightd_proto import weightd_pb2

TOKENS_AN_EXPERT = 16
OUTPUT_TOLERANCE = 1e-4  # of the largest output


def is_experts_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether these are an input [tokens, hidden size], the experts of each token [tokens, k], and their weights.

    Or one tensor that holds an input for each expert, one after the other (Llama 4).
    """
    try:
        values = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())
    except TypeError:
        return False
    if not all(isinstance(value, Tensor) and value.dim() == 2 for value in values):
        return False
    if len(values) == 1:
        return len(_matrices(module)) > 1
    floats = [value.is_floating_point() for value in values]
    return floats == [True, False, True] and values[1].shape == values[2].shape and len(values[0]) == len(values[1])


def experts_site(path: str, module: nn.Module, hidden_size: int) -> Site | None:
    """The site of the experts in `module`, or None if they are not what the kernels compute."""
    for parts in _arrangements(module, hidden_size):
        activation = _activation(module, parts)
        if activation is not None and _is_proven(module, parts, activation):
            neurons = _rows(module, parts[-1].rows).shape[1]
            common = without_learned(activation)
            return Site(path, Layer.EXPERTS, common, parts, neurons, hidden_size, parts[-1].rows.experts)
    return None


def _matrices(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.named_parameters(recurse=False) if value.dim() == 3}


def _call(module: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The module's output for tokens with these experts. If it takes one tensor, the weights are not its concern."""
    if len(inspect.signature(module.forward).parameters) > 1:
        output: Tensor = module(x, chosen, weights)
        return output
    experts = next(iter(_matrices(module).values()))[0]
    inputs = x.new_zeros(experts, *x.shape)
    for of in chosen.T:
        inputs[of, torch.arange(len(x))] = x
    outputs = module(inputs.flatten(0, 1)).view_as(inputs)
    each: Tensor = outputs[chosen, torch.arange(len(x))[:, None]]
    return (each * weights[..., None]).sum(dim=1)


def _arrangements(module: nn.Module, hidden_size: int) -> Iterator[tuple[Part, ...]]:
    """The ways in which the module's parameters can be the parts of its experts, by their shapes."""
    shapes = _matrices(module)
    if len(shapes) not in (2, 3) or len({shape[0] for shape in shapes.values()}) > 1:
        return
    if any(hidden_size not in shape[1:] for shape in shapes.values()):
        return
    rows = {name: Rows(name, shape[1] == hidden_size, experts=shape[0]) for name, shape in shapes.items()}
    sizes = {name: shape[1] + shape[2] - hidden_size for name, shape in shapes.items()}
    biases = {name: bias for name in shapes if (bias := _bias(module, name)) is not None}

    def part(which: str, name: str, block: int = 0, blocks: int = 1, interleaved: bool = False) -> Part:
        of = replace(rows[name], block=block, blocks=blocks, interleaved=interleaved)
        return Part(which, of, replace(of, parameter=biases[name], columns=False) if name in biases else None)

    for *first, down in itertools.permutations(shapes):
        fused = len(first) == 1 and sizes[first[0]] == 2 * sizes[down]
        if fused:
            for interleaved, gate in itertools.product((False, True), (0, 1)):
                both = part("gate", first[0], gate, 2, interleaved), part("up", first[0], 1 - gate, 2, interleaved)
                yield *both, part("down", down)
        elif all(sizes[name] == sizes[down] for name in first):
            names = ["up"] if len(first) == 1 else ["gate", "up"]
            yield *(part(which, name) for which, name in zip(names, first, strict=True)), part("down", down)


def _bias(module: nn.Module, weight: str) -> str | None:
    parameters = dict(module.named_parameters())
    names = [f"{weight}_bias", f"{weight.removesuffix('weight')}bias"]
    return next((name for name in names if name in parameters and parameters[name].dim() == 2), None)


def _rows(module: nn.Module, rows: Rows) -> Tensor:
    return rows.of(module.get_parameter(rows.parameter))


def _activation(module: nn.Module, parts: tuple[Part, ...]) -> weightd_pb2.Activation | None:
    """Found from what the module makes of products: for the time, its last matrices are made to give just that."""
    *first, down = parts
    experts, neurons, hidden_size = _rows(module, down.rows).shape
    scalars = scalars_of(module)
    target = max([PRODUCTS_MIN, *(1.2 * limit for limit in limits_among(scalars))])
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(experts * TOKENS_AN_EXPERT, hidden_size, generator=generator)
    expert = torch.arange(len(x)) % experts
    x *= target / _products(module, first[-1], x, expert).std()
    made = []
    for begin in range(0, neurons, hidden_size):
        with _showing(module, down, begin):
            made.append(_call(module, x, expert[:, None], torch.ones(len(x), 1))[:, : neurons - begin])
    gate, up = _gate_and_up(module, first, x, expert)
    return recognised(Samples(gate, up, torch.cat(made, dim=1)), lambda: scalars, held_by(module))


def _gate_and_up(module: nn.Module, first: list[Part], x: Tensor, expert: Tensor) -> tuple[Tensor | None, Tensor]:
    *gate, up = (_products(module, part, x, expert) for part in first)
    return gate[0] if gate else None, up


def _products(module: nn.Module, part: Part, x: Tensor, expert: Tensor) -> Tensor:
    """[tokens, neurons], with biases."""
    products = torch.einsum("tnh,th->tn", _rows(module, part.rows)[expert], x)
    return products if part.bias is None else products + _rows(module, part.bias)[expert]


@contextmanager
def _showing(module: nn.Module, down: Part, begin: int) -> Iterator[None]:
    """Has the module return what it made of a token's products, from neuron `begin` on, as many as an output holds."""
    changed = [module.get_parameter(down.rows.parameter)]
    if down.bias is not None:
        changed.append(module.get_parameter(down.bias.parameter))
    kept = [parameter.clone() for parameter in changed]
    for parameter in changed:
        parameter.zero_()
    rows = _rows(module, down.rows)  # a view
    rows[:, begin:].diagonal(dim1=-2, dim2=-1).fill_(1)
    try:
        yield
    finally:
        for parameter, values in zip(changed, kept, strict=True):
            parameter.copy_(values)


def _is_proven(module: nn.Module, parts: tuple[Part, ...], activation: weightd_pb2.Activation) -> bool:
    """Whether the module's output is the formula's for tokens with two experts each."""
    *first, down = parts
    experts, _, hidden_size = _rows(module, down.rows).shape
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(experts * TOKENS_AN_EXPERT, hidden_size, generator=generator)
    chosen = torch.stack([torch.arange(len(x)) % experts, (torch.arange(len(x)) + 1) % experts], dim=1)
    weights = torch.rand(chosen.shape, generator=generator)
    expected = torch.zeros_like(x)
    for of in range(chosen.shape[1]):
        expert = chosen[:, of]
        gate, up = _gate_and_up(module, first, x, expert)
        output = torch.einsum("tn,tnh->th", made_by(activation, gate, up), _rows(module, down.rows)[expert])
        if down.bias is not None:
            output += module.get_parameter(down.bias.parameter)[expert]
        expected += weights[:, of, None] * output
    difference = (_call(module, x, chosen, weights) - expected).abs().max()
    return bool(difference <= OUTPUT_TOLERANCE * expected.abs().max())
