"""What a neuron makes of its products with its gate row and its up row: formulas of the kernels, recognised by numbers.

The formula is the message Activation of weightd.proto; client/native/kernels/activation.h computes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashclient.model.activations import FUNCTIONS, HELD, neurons_of
from weightd_proto import weightd_pb2

FACTOR_MIN = 0.05
TRIED = [
    name for name in FUNCTIONS if name not in {held.function for held in HELD.values()}
]  # wherever there is an FFN
QUICK_GELU = 1.702  # transformers' QuickGELUActivation has it in its code

SMALL = 1.5  # below every limit: products this small show the function alone
SMALL_SAMPLES_MIN = 16
SMALL_SAMPLES_MAX = 64
VARIES = 0.1
PRODUCTS_MIN = 4.0  # standard deviation of products that show a whole formula, at least
TOLERANCE = 3e-5  # of fp32 sums over tens of terms; gelu and its tanh approximation differ by 5e-4


@dataclass(frozen=True)
class Samples:
    """Of neurons of one FFN: their products with gate rows (None without a gate) and up rows, and what came of them."""

    gate: Tensor | None
    up: Tensor
    made: Tensor

    def near(self) -> Samples:
        """Some with small products."""
        chosen = self.up.abs() < SMALL
        if self.gate is not None:
            chosen &= self.gate.abs() < SMALL
        where = chosen.flatten().nonzero()[:SMALL_SAMPLES_MAX, 0]
        gate = None if self.gate is None else self.gate.flatten()[where]
        return Samples(gate, self.up.flatten()[where], self.made.flatten()[where])

    def scaled(self, factor: float) -> Samples:
        """The same with `factor` times the products with the gate rows, or with the up rows if there is no gate."""
        if self.gate is None:
            return Samples(None, self.up * factor, self.made)
        return Samples(self.gate * factor, self.up, self.made)

    def offsets(self) -> list[float]:
        """What can be added to the products with the up row."""
        return [0.0] if self.gate is None else [0.0, 1.0]

    def keep_signs(self, up_offset: float) -> bool:
        """Whether no neuron's output has the sign that no function gives it: a quick test, which few others pass."""
        signs = self.made * self.up if self.gate is None else self.made * self.gate * (self.up + up_offset)
        return bool((signs >= -TOLERANCE).all())

    def vary(self) -> bool:
        """Whether the products are of both signs and differ; zeros fit every formula."""
        products = [self.up] if self.gate is None else [self.up, self.gate]
        return all(bool((of > VARIES).any()) and bool((of < -VARIES).any()) for of in products)


def made_by(activation: weightd_pb2.Activation, gate: Tensor | None, up: Tensor) -> Tensor:
    """What the formula makes of products."""
    return neurons_of(activation, up) if gate is None else neurons_of(activation, gate, up)


def recognised(
    samples: Samples,
    scalars_of: Callable[[], Iterable[float]],
    held: Iterable[weightd_pb2.Activation] = (),
) -> weightd_pb2.Activation | None:
    """The formula that gives what was made of the products, or None. Of several that do, the closest.

    Args:
        scalars_of: gives numbers that the module or its config holds: parameters and limits are looked for among them.
        held: further formulas to try: held_by() of the module.
    """
    if not samples.vary():
        return None
    for activation, offset in itertools.product(held, samples.offsets()):
        activation.up_offset = offset
        if _error(activation, samples) <= 1:
            return activation
    if not any(samples.near().keep_signs(offset) for offset in samples.offsets()):
        return None
    scalars = sorted(set(scalars_of()))
    plain = _closest(samples, scalars)
    if plain is not None:
        return plain
    for factor in scalars:
        if FACTOR_MIN < factor < 1 / FACTOR_MIN:
            found = _closest(samples.scaled(factor), scalars)
            if found is not None:
                found.gate_factor = factor
                return found
    return None


def _closest(samples: Samples, scalars: list[float]) -> weightd_pb2.Activation | None:
    near, gated = samples.near(), samples.gate is not None
    if len(near.made) < SMALL_SAMPLES_MIN:
        return None
    errors: list[tuple[float, int, weightd_pb2.Activation]] = []
    offsets = [offset for offset in samples.offsets() if near.keep_signs(offset)]
    for activation in _functions(scalars, gated, offsets):
        if _error(activation, near) > 1:
            continue
        for limited in _with_limits(activation, scalars, gated):
            error = _error(limited, samples)
            if error <= 1:
                errors.append((error, len(errors), limited))
    return min(errors)[2] if errors else None


def _functions(scalars: list[float], gated: bool, offsets: list[float]) -> Iterable[weightd_pb2.Activation]:
    """The formulas without limits."""
    for name in TRIED:
        if name == "gated_relu" and not gated:
            continue
        parameters = [0.0]
        if name == "swish":
            parameters = [QUICK_GELU, *(scalar for scalar in scalars if 0.1 < scalar < 10 and scalar != 1)]
        elif name == "fatrelu":
            parameters = [scalar for scalar in scalars if 0 < scalar < SMALL]
        for parameter, offset in itertools.product(parameters, offsets):
            yield weightd_pb2.Activation(function=name, parameter=parameter, up_offset=offset)


def _with_limits(
    activation: weightd_pb2.Activation, scalars: list[float], gated: bool
) -> Iterable[weightd_pb2.Activation]:
    """`activation` without limits, and with every choice of limits."""
    limits: list[float | None] = [None, *limits_among(scalars)]
    of_up = limits if gated else [None]
    for gate_max, activation_max, up_limit in itertools.product(limits, limits, of_up):
        limited = weightd_pb2.Activation()
        limited.CopyFrom(activation)
        if gate_max is not None:
            limited.gate_max = gate_max
        if activation_max is not None:
            limited.activation_max = activation_max
        if up_limit is not None:
            limited.up_limit = up_limit
        yield limited


def limits_among(scalars: Iterable[float]) -> list[float]:
    """The numbers that can be limits of products."""
    return sorted({scalar for scalar in scalars if SMALL < scalar <= 64})


def _error(activation: weightd_pb2.Activation, samples: Samples) -> float:
    """The largest difference between the formula and what was made, over what rounding explains."""
    expected = made_by(activation, samples.gate, samples.up)
    bound = TOLERANCE * (1 + expected.abs() + (0 if samples.gate is None else samples.up.abs()))
    return float(((expected - samples.made).abs() / bound).nan_to_num(torch.inf).max())
