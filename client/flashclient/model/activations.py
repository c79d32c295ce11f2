"""What FFNs compute between their projections, in torch: the reference of the kernels' work.

A record says it (weightd.v1.Activation). The kernels' formulas are in client/native/kernels/activation.h.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from weightd_proto.weightd_pb2 import Activation

# By the kernels' name: of v, a neuron's product with its gate row, and the activation's parameter.
FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda v, _: functional.relu(v),
    "relu_squared": lambda v, _: functional.relu(v) ** 2,
    "fatrelu": lambda v, threshold: functional.threshold(v, threshold, 0.0),
    "silu": lambda v, _: functional.silu(v),
    "swish": lambda v, factor: v * torch.sigmoid(factor * v),
    "gelu": lambda v, _: functional.gelu(v),
    "gelu_tanh": lambda v, _: functional.gelu(v, approximate="tanh"),
    "gated_relu": lambda v, _: functional.relu(v),
}


def neurons_of(activation: Activation, gate: Tensor, up: Tensor | None = None) -> Tensor:
    """The neurons' outputs, of their products with gate rows and up rows; `gate` is those with up rows without a gate.

    KeyError for a function that is not known.
    """
    factor = activation.gate_factor if activation.HasField("gate_factor") else 1.0
    v = _at_most(activation, "gate_max", gate * factor)
    v = _at_most(activation, "activation_max", FUNCTIONS[activation.function](v, activation.parameter))
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
    """Whether neurons are exactly zero for some inputs; other functions are so only by rounding."""
    return bool(neurons_of(activation, torch.tensor(-1.0, dtype=torch.float32, device="cpu")) == 0)
