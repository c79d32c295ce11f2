"""Products with the resident matrices by the native kernel, in which the bits of a row depend on that row alone.

A matrix library picks the order of its sums by the number of rows, so other rows of a batch, drafts and padding would
change tokens. The kernel is always used. A choice by timing at start could fall on torch's product, which rounds
differently, so a restart could change tokens. scripts/bench_kernels.py compares the speed of both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashclient._native import Linear, Workers
from flashclient.kernels.arrays import KernelOf, array_of
from flashclient.kernels.dtypes import KERNEL_DTYPES
from flashclient.kernels.encoded_matrix import matrix_of
from flashclient.kernels.trials import has_plain_weights

BIAS_DTYPES = (torch.float32,)  # beside that of the weight


class ResidentLinear(nn.Linear):
    """nn.Linear whose forward pass is the native kernel. Weight and bias are not copied.

    The result of a row depends on that row alone, bit for bit. It is summed in fp32 and rounded once. torch computes
    what the kernel cannot: gradients, other dtypes and devices.
    """

    kernels: KernelOf[Linear]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of x."""
        if torch.compiler.is_compiling() or not self._is_for_kernel(x):
            return super().forward(x)
        rows = x.detach().reshape(-1, self.in_features).contiguous()
        y = torch.empty(len(rows), self.out_features, dtype=x.dtype, device="cpu")
        bias = None if self.bias is None else array_of(self.bias)
        self.kernels[x.dtype].project(matrix_of(self.weight), bias, array_of(rows), array_of(y))
        if self.out_features == 1:  # the gate of a shared expert, which a sigmoid follows
            y = apart(y)
        return y.view(*x.shape[:-1], self.out_features)

    def _is_for_kernel(self, x: Tensor) -> bool:
        fits = x.shape[-1] == self.in_features and self.kernels.takes(x)
        return fits and has_plain_weights(self, x, BIAS_DTYPES)


def apart(x: Tensor) -> Tensor:
    """The same values, no two side by side.

    torch computes functions of neighbours (sigmoid, softmax) in groups, and of the last ones by other code, so a row
    would depend on the number of rows.
    """
    return torch.stack([x, x], dim=-1)[..., 0]


def use_fast_linears(model: nn.Module, workers: Workers, instruction_set: str | None = None) -> int:
    """Makes every nn.Linear of `model` (projections and head, tied or not) use the native kernel.

    Only the class of the modules changes. They stay the same objects under the same names, with their hooks, so
    state_dict, tied weights and references go on working. Subclasses of nn.Linear are not changed.

    Args:
        workers: shared with the other kernels.
        instruction_set: of the names in native/kernels/kernels.h; None takes the best.

    Returns:
        The number of modules changed.

    Raises:
        ValueError: the processor does not have `instruction_set`.
    """
    return _change(
        model, KernelOf({dtype: Linear(workers, name, instruction_set) for dtype, name in KERNEL_DTYPES.items()})
    )


def use_fast_linears_again(model: nn.Module) -> int:
    """The same, with the same kernels, for what was added to `model` since: the matrices of an adapter."""
    kernels = next((module.kernels for module in model.modules() if isinstance(module, ResidentLinear)), None)
    return 0 if kernels is None else _change(model, kernels)


def _change(model: nn.Module, kernels: KernelOf[Linear]) -> int:
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    for module in linears:
        module.__class__ = ResidentLinear
        module.kernels = kernels  # type: ignore[assignment]
    return len(linears)
