"""The reference of a model whose activation its transformers class does not have: the class, amended.

fatrelu (ProSparse) replaces the activation's module. Relu on gate and up (Bamboo, TurboSparse) is added to the output
of the up projection. Mixtures whose experts are one tensor apply it in their own loop.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from flashclient.errors import ModelError
from flashclient.model.activations import FUNCTIONS
from weightd_proto import weightd_pb2

# Attributes of transformers' FFNs that hold their activation.
ACTIVATION_NAMES = ("act_fn", "act", "activation_fn", "activation")


class ActivationModule(nn.Module):
    """What is applied to the gate's products, or to up's without a gate."""

    def __init__(self, activation: weightd_pb2.Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, values: Tensor) -> Tensor:
        return FUNCTIONS[self.activation.function](values, self.activation.parameter)


def amend(model: nn.Module, activation: weightd_pb2.Activation) -> None:
    """Makes the FFNs of transformers' `model` compute `activation`. Raises ModelError where it finds none."""
    amended = 0
    for name, module in model.named_modules():
        held = [key for key in ACTIVATION_NAMES if callable(getattr(module, key, None))]
        if not held:
            continue
        setattr(module, held[0], ActivationModule(activation))
        if activation.function == "gated_relu":
            _apply_to_up(module, name)
        amended += 1
    if amended == 0:
        raise ModelError(f"{type(model).__name__} has no activation that {activation.function} could replace")


def _apply_to_up(module: Any, name: str) -> None:
    up = getattr(module, "up_proj", getattr(module, "gate_up_proj", None))
    if isinstance(up, nn.Linear):
        up.register_forward_hook(lambda _module, _inputs, output: torch.relu(output))
    elif isinstance(up, Tensor) and up.dim() == 3 and not getattr(module, "is_transposed", False):
        module.forward = MethodType(_experts, module)
    else:
        raise ModelError(f"{name} ({type(module).__name__}) has no up projection, which gated_relu needs")


def _experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The sum over each token's experts of weight * down (relu(gate x) * relu(up x))."""
    result = torch.zeros_like(hidden_states)
    for expert in sorted(set(top_k_index.flatten().tolist())):
        tokens, place = torch.where(top_k_index == expert)
        gate, up = (hidden_states[tokens] @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
        output = (torch.relu(gate) * torch.relu(up)) @ module.down_proj[expert].T
        result.index_add_(0, tokens, output * top_k_weights[tokens, place, None])
    return result
