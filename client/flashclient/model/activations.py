"""What FFNs compute between their projections, in torch: the reference of the kernels' work.

A record says it (weightd.v1.Activation). The kernels' formulas are in client/native/kernels/activation.h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightd_proto.weightd_pb2 import Activation, Layer, Model


def _xielu(v: Tensor, positive: float, negative: float, slope: float, below: float) -> Tensor:
    return torch.where(v > 0, positive * v * v, negative * (torch.expm1(v.clamp(max=below)) - v)) + slope * v


# By the kernels' name: of v, a neuron's product with its gate row, and the activation's parameters.
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": lambda v, *_: functional.relu(v),
    "relu_squared": lambda v, *_: functional.relu(v) ** 2,
    "fatrelu": lambda v, threshold, *_: functional.threshold(v, threshold, 0.0),
    "silu": lambda v, *_: functional.silu(v),
    "swish": lambda v, factor, *_: v * torch.sigmoid(factor * v),
    "gelu": lambda v, *_: functional.gelu(v),
    "gelu_tanh": lambda v, *_: functional.gelu(v, approximate="tanh"),
    "gated_relu": lambda v, *_: functional.relu(v),
    "xielu": _xielu,
    "leaky_relu": lambda v, slope, *_: torch.where(v < 0, slope * v, v),
    "hardswish": lambda v, *_: functional.hardswish(v),
    "laplace": lambda v, *_: 0.5 * (1 + torch.erf((v - 0.707107) / (0.282095 * math.sqrt(2)))),
    "mish": lambda v, *_: functional.mish(v),
    "sqrtsoftplus": lambda v, *_: functional.softplus(v).sqrt(),
    "sigmoid": lambda v, *_: torch.sigmoid(v),
    "tanh": lambda v, *_: torch.tanh(v),
    "linear": lambda v, *_: v,
}


# Those that are exactly zero for every v up to a number, by their parameter. Others are zero for one v, or by rounding.
ZERO_UP_TO: dict[str, Callable[[float], float]] = {
    **dict.fromkeys(("relu", "relu_squared", "gated_relu"), lambda _: 0.0),
    "fatrelu": lambda threshold: threshold,
    "hardswish": lambda _: -3.0,
}


@dataclass(frozen=True)
class Held:
    """A module that computes one of FUNCTIONS.

    Attributes:
        constants: its attributes that are the function's parameters.
        learned: its tensors, of one element each, from which the parameters follow instead.
    """

    function: str
    constants: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()


# Functions that few models have are looked for only beside a module that computes them. By its class.
HELD = {
    "Hardswish": Held("hardswish"),
    "LaplaceActivation": Held("laplace"),
    "LeakyReLU": Held("leaky_relu", ("negative_slope",)),
    "LinearActivation": Held("linear"),
    "MishActivation": Held("mish"),
    "PReLU": Held("leaky_relu", learned=("weight",)),
    "Sigmoid": Held("sigmoid"),
    "SqrtSoftplusActivation": Held("sqrtsoftplus"),
    "Tanh": Held("tanh"),
    "XIELUActivation": Held("xielu", learned=("alpha_p", "alpha_n", "beta", "eps")),
}


def _of_xielu(alpha_p: Tensor, alpha_n: Tensor, beta: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
    return functional.softplus(alpha_p), beta + functional.softplus(alpha_n), beta, eps


# Parameters that follow from what was learned and are not that itself. In its dtype, as transformers computes them.
FROM_LEARNED: dict[str, Callable[..., tuple[Tensor, ...]]] = {"xielu": _of_xielu}


def held_by(module: nn.Module) -> Iterator[Activation]:
    """What the modules of HELD compute that are part of `module`. `learned` is of names below it."""
    for path, part in module.named_modules():
        held = HELD.get(type(part).__name__)
        if held is None:
            continue
        learned = [getattr(part, name) for name in held.learned]
        if any(value.numel() != 1 or value.is_meta for value in learned):
            continue
        activation = Activation(function=held.function)
        activation.learned.extend(f"{path}.{name}" for name in held.learned)
        if learned:
            yield _with_learned(activation, learned)
        else:
            yield _with(activation, [getattr(part, name) for name in held.constants])


def settled(record: Model, tensors: Mapping[str, Tensor]) -> Model:
    """The record with an activation of its own for each layer that has learned the parameters of one.

    Args:
        tensors: the resident ones, by name.
    """
    if not record.activation.learned:
        return record
    full = Model()
    full.CopyFrom(record)
    for layer in full.layers:
        values = [tensors[f"{layer.module}.{name}"] for name in record.activation.learned]
        layer.activation.CopyFrom(_with_learned(record.activation, values))
    return full


def activation_of(record: Model, layer: Layer) -> Activation:
    """What the FFN of `layer` computes."""
    return layer.activation if layer.HasField("activation") else record.activation


def without_learned(activation: Activation) -> Activation:
    """What all layers of a model have in common of an activation with learned parameters."""
    common = Activation()
    common.CopyFrom(activation)
    if activation.learned:
        common.ClearField("parameter")
        common.ClearField("further")
    return common


def _with_learned(activation: Activation, learned: list[Tensor]) -> Activation:
    of_function = FROM_LEARNED.get(activation.function)
    return _with(activation, list(map(float, learned if of_function is None else of_function(*learned))))


def _with(activation: Activation, parameters: Sequence[float]) -> Activation:
    made = Activation()
    made.CopyFrom(activation)
    if parameters:
        made.parameter = parameters[0]
        made.further.extend(parameters[1:])
    return made


def neurons_of(activation: Activation, gate: Tensor, up: Tensor | None = None) -> Tensor:
    """The neurons' outputs, of their products with gate rows and up rows; `gate` is those with up rows without a gate.

    KeyError for a function that is not known.
    """
    factor = activation.gate_factor if activation.HasField("gate_factor") else 1.0
    v = _at_most(activation, "gate_max", gate * factor)
    made = FUNCTIONS[activation.function](v, activation.parameter, *activation.further)
    v = _at_most(activation, "activation_max", made)
    if up is None:
        return v
    if activation.function == "gated_relu":
        up = functional.relu(up)
    if activation.HasField("up_limit"):
        up = up.clamp(-activation.up_limit, activation.up_limit)
    return v * (up + activation.up_offset)


def _at_most(activation: Activation, limit: str, v: Tensor) -> Tensor:
    return v.clamp(max=getattr(activation, limit)) if activation.HasField(limit) else v


def has_exact_zeros(activation: Activation) -> bool:
    """Whether neurons are exactly zero for inputs that are not rare."""
    no_slope = activation.function == "leaky_relu" and activation.parameter == 0.0
    return activation.function in ZERO_UP_TO or no_slope
