"""The activations of FFNs: the kernels' names, and transformers' names for the same functions.

The formulas of the kernels are in client/native/kernels/activation.h.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from flashclient.errors import ModelError

# By the kernels' name: transformers' names for classes of the same function. Its other names for a function
# (gelu_python, gelu_python_tanh) stand for objects of one of these classes.
TRANSFORMERS_NAMES = {
    "relu": ("relu",),
    "relu_squared": ("relu2",),
    "silu": ("silu", "swish"),
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate"),
}


def activation_name(function: nn.Module) -> str:
    """The kernels' name of transformers' activation `function`. Raises ModelError where no kernel has it."""
    for name, transformers_names in TRANSFORMERS_NAMES.items():
        if type(function) in {type(ACT2FN[transformers_name]) for transformers_name in transformers_names}:
            return name
    known = ", ".join(TRANSFORMERS_NAMES)
    raise ModelError(f"no kernel for activation {type(function).__name__}: {known} have one")


def has_exact_zeros(name: str) -> bool:
    """Whether the activation `name` is exactly zero for some inputs; others are so only by rounding."""
    return bool(torch_activation(name)(torch.tensor(-1.0, dtype=torch.float32, device="cpu")) == 0)


def torch_activation(name: str) -> nn.Module:
    """transformers' module for the kernels' activation `name`: the reference of the kernels' work."""
    function: nn.Module = ACT2FN[TRANSFORMERS_NAMES[name][0]]
    return function
