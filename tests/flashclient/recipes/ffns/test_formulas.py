"""Formulas of neurons, recognised from numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2CLS, ACT2FN

from flashclient.model.activations import held_by, without_learned
from flashclient.recipes.ffns.formulas import TRIED, Samples, made_by, recognised
from flashclient.recipes.ffns.site import scalars_of
from weightd_proto.weightd_pb2 import Activation

GATED = [
    *(Activation(function=name) for name in TRIED if name not in ("swish", "fatrelu")),
    Activation(function="swish", parameter=1.702, up_offset=1, gate_max=7, up_limit=7),
    Activation(function="swish", parameter=1.3),
    Activation(function="fatrelu", parameter=0.01),
    Activation(function="silu", gate_max=10, up_limit=10),
    Activation(function="silu", activation_max=7, up_limit=7),
    Activation(function="silu", gate_factor=1.3),
]
UNGATED = [Activation(function=name) for name in TRIED if name not in ("swish", "fatrelu", "gated_relu")]
SCALARS = [1e-6, 0.01, 1.3, 7.0, 10.0]


def products(seed: int, scale: float = 6) -> Tensor:
    return torch.randn(64, 96, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("activation", GATED, ids=str)
def test_a_formula_with_gate_is_recognised(activation: Activation) -> None:
    gate, up = products(1), products(2)
    made = made_by(activation, gate, up)
    assert recognised(Samples(gate, up, made), lambda: SCALARS) == activation


@pytest.mark.parametrize("activation", UNGATED, ids=str)
def test_a_formula_without_gate_is_recognised(activation: Activation) -> None:
    up = products(1)
    assert recognised(Samples(None, up, made_by(activation, None, up)), lambda: SCALARS) == activation


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ACT2CLS)
def test_every_activation_of_transformers_is_recognised(name: str, gated: bool) -> None:
    module = ACT2FN[name].float().requires_grad_(False)
    for parameter in module.parameters():
        parameter.add_(0.3)
    gate, up = products(1), products(2)
    made = module(gate) * up if gated else module(up)
    samples = Samples(gate if gated else None, up, made)
    found = recognised(samples, lambda: scalars_of(module), held_by(module))
    assert found is not None
    torch.testing.assert_close(made_by(found, samples.gate, up), made, rtol=1e-5, atol=1e-5)
    assert not found.learned or without_learned(found).parameter == 0


def test_gate_and_up_are_told_apart() -> None:
    gate, up = products(1), products(2)
    made = made_by(Activation(function="silu"), gate, up)
    assert recognised(Samples(up, gate, made), lambda: SCALARS) is None


def test_a_limit_that_is_not_among_the_numbers_is_not_recognised() -> None:
    gate, up = products(1), products(2)
    made = made_by(Activation(function="silu", gate_max=7), gate, up)
    assert recognised(Samples(gate, up, made), lambda: [10.0]) is None


def test_one_neuron_that_differs_is_enough() -> None:
    gate, up = products(1), products(2)
    made = made_by(Activation(function="gelu"), gate, up)
    made[5, 7] += 0.01
    assert recognised(Samples(gate, up, made), lambda: SCALARS) is None


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_products_that_show_nothing_are_no_proof(value: float) -> None:
    of = torch.full((64, 96), value)
    assert recognised(Samples(of, of, of), lambda: SCALARS) is None
