"""The resident matrices at decode: products with a few rows by the native kernel, at the speed of memory.

torch's bfloat16 matrix-vector product moves 6 to 11 GB/s where memory gives 17, and projections and head are most of
what a decode step computes. From 1 to 16 rows the kernel is used wherever the processor has vectors that it is written
for, and torch above that. This is a rule, not a measurement at start: the two round differently, and a choice that a
busy machine could turn over would let a restart change tokens. The measurement that backs the rule is
scripts/bench_kernels.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashclient._native import Ffn, Linear, Workers
from flashclient.arrays import KernelOf, array_of

ROWS_MAX = Ffn.TOKENS_MAX
STORED_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
VECTOR_INSTRUCTION_SETS = ("avx512", "avx2")  # without them torch's matrix library is the faster one


class ResidentLinear(nn.Linear):
    """nn.Linear whose forward takes up to 16 rows to the native kernel. Weight and bias stay what and where they are.

    A row's result depends on that row alone, bit for bit, for any number of rows from 1 to 16. It is summed in fp32 and
    rounded once. What the kernel cannot do (gradients, other dtypes or devices) is torch's.
    """

    kernels: dict[torch.dtype, Linear]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of x."""
        rows = x.numel() // self.in_features
        if torch.compiler.is_compiling() or not 0 < rows <= ROWS_MAX or not self._is_for_kernel(x):
            return super().forward(x)
        flat = x.detach().reshape(rows, self.in_features).to(torch.float32).contiguous()
        y = torch.empty(rows, self.out_features, dtype=torch.float32, device="cpu")
        self.kernels[x.dtype].multiply(array_of(self.weight), array_of(flat), array_of(y))
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _is_for_kernel(self, x: Tensor) -> bool:
        weight = self.weight
        fits = x.dtype == weight.dtype and x.dtype in self.kernels and x.shape[-1] == self.in_features
        plain = weight.is_cpu and x.is_cpu and weight.is_contiguous()
        with_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        untouched = type(weight) is nn.Parameter and not torch.is_autocast_enabled("cpu")
        return fits and plain and untouched and not with_gradient


def use_fast_linears(model: nn.Module, workers: Workers, instruction_set: str | None = None) -> int:
    """Lets every nn.Linear of `model` (projections, head, tied or not) take few rows to the native kernel.

    Modules stay the same objects under the same names, with their hooks, so that state_dict, tied weights and
    references go on working: only their class changes. Subclasses of nn.Linear are left alone.

    Args:
        workers: shared with the other kernels.
        instruction_set: avx512, avx2 or portable, whatever it costs; None takes the best, and nothing if that is
            slower than torch.

    Returns:
        The number of modules changed.

    Raises:
        ValueError: the processor lacks `instruction_set`.
    """
    kernels = KernelOf({dtype: Linear(workers, name, instruction_set) for dtype, name in STORED_DTYPES.items()})
    if instruction_set is None and kernels[torch.float32].instruction_set not in VECTOR_INSTRUCTION_SETS:
        return 0
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    for module in linears:
        module.__class__ = ResidentLinear
        module.kernels = kernels  # type: ignore[assignment]
    return len(linears)
