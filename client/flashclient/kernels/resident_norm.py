"""Norms of rows by the native kernel: one call instead of some six of torch, between which the caches are cold.

A module becomes native if it is a norm: it has no children, a vector as weight and perhaps one as bias, takes one
tensor, and computes one of the kernel's formulas for random weights and rows. What it is called does not matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from flashclient._native import Norm, Norms, Workers
from flashclient.kernels.arrays import KernelOf, array_of
from flashclient.kernels.dtypes import KERNEL_DTYPES
from flashclient.kernels.trials import (
    Native,
    has_plain_weights,
    has_tensors,
    make_native,
    random_tensors,
    same_but_for_rounding,
    scalars,
)

TRIED_SCALES = (1.0, 0.01, 100.0)  # of rows
EPS_NAMES = ("variance_epsilon", "eps", "epsilon")


@dataclass(frozen=True)
class NormFormula:
    """What a norm computes; client/native/kernels/norm.h has the kinds."""

    kind: str
    eps: float
    offset: float = 0.0

    def of(self, weight: Tensor, bias: Tensor | None) -> Norm:
        """The native norm with these weights, [width] each."""
        arrays = (array_of(weight), None if bias is None else array_of(bias))
        return Norm(self.kind, len(weight), *arrays, self.eps, self.offset)


class NativeNorm(Native):
    """The forward pass of a norm that became native. Other cases are left to the class that it had."""

    formula: NormFormula
    norm_kernels: KernelOf[Norms]
    _held: tuple[tuple[int | None, int | None], Norm] | None = None

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """[..., width] -> the same shape and dtype. The class that it had names the argument."""
        (x,) = (*args, *kwargs.values())
        if not self._is_for_kernel(x):
            result: Tensor = super().forward(x)
            return result
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        y = torch.empty_like(rows)
        self.norm_kernels[x.dtype].apply(self.native_norm(), array_of(rows), array_of(y))
        return y.view(x.shape)

    def native_norm(self) -> Norm:
        """The norm with the weights that the module has now."""
        weight, bias = self._parameters["weight"], self._parameters.get("bias")
        assert weight is not None  # is_plain() has seen it
        pointers = (weight.data_ptr(), None if bias is None else bias.data_ptr())
        held = self.__dict__.get("_held")
        if held is None or held[0] != pointers:
            held = self.__dict__["_held"] = (pointers, self.formula.of(weight, bias))
        return held[1]

    def _is_for_kernel(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or not self.norm_kernels.takes(x):
            return False
        weight = self._parameters.get("weight")
        return weight is not None and x.shape[-1] == len(weight) and has_plain_weights(self, x)


def use_native_norms(model: nn.Module, workers: Workers, instruction_set: str | None = None) -> int:
    """Makes every norm of `model` native whose formula the kernel has.

    Args:
        workers: shared with the other kernels.
        instruction_set: of the names in native/kernels/kernels.h; None takes the best.

    Returns:
        The number of modules changed.

    Raises:
        ValueError: the processor does not have `instruction_set`.
    """
    kernels = KernelOf({dtype: Norms(workers, name, instruction_set) for dtype, name in KERNEL_DTYPES.items()})

    def find(module: nn.Module) -> dict[str, Any] | None:
        formula = next((one for one in _formulas(module) if _computes(module, one, kernels)), None)
        return None if formula is None else {"formula": formula, "norm_kernels": kernels}

    return make_native(model, NativeNorm, _key, find)


def _key(module: nn.Module) -> Any:
    """What decides whether a module is a norm, but for the values of its weights; None: it cannot be one."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    vectors = [one for one in module._parameters.values() if one is not None]
    plain = (
        weight is not None
        and set(module._parameters) <= {"weight", "bias"}
        and not has_tensors(module)
        and next(module.children(), None) is None
        and all(
            type(one) is nn.Parameter and one.dim() == 1 and one.shape == weight.shape and one.dtype == weight.dtype
            for one in vectors
        )
        and all(one.is_cpu for one in vectors)
    )
    kind: Any = type(module)
    if not plain or weight is None or weight.dtype not in KERNEL_DTYPES or len(_arguments(kind)) != 1:
        return None
    return (type(module), len(weight), weight.dtype, bias is None, scalars(module))


@cache
def _arguments(kind: Any) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]


def _formulas(module: nn.Module) -> Iterator[NormFormula]:
    for eps in {float(value) for name, value in vars(module).items() if name in EPS_NAMES and value is not None}:
        yield NormFormula("rms", eps)
        yield NormFormula("scaled_rms", eps, 1.0)
        yield NormFormula("scaled_rms", eps, 0.0)
        yield NormFormula("layer", eps)


def _computes(module: nn.Module, formula: NormFormula, kernels: dict[torch.dtype, Norms]) -> bool:
    """Whether the module computes the formula for random weights and rows of several sizes."""
    weight = module._parameters["weight"]
    assert weight is not None
    some = random_tensors(weight.dtype)
    weights = {name: some(len(weight)) for name, one in module._parameters.items() if one is not None}
    x = torch.cat([some(1, len(weight)) * scale for scale in TRIED_SCALES])
    try:
        expected = torch.func.functional_call(module, weights, (x,))
    except Exception:  # whatever a module raises that was not made for this
        return False
    if not isinstance(expected, Tensor) or expected.shape != x.shape or expected.dtype != x.dtype:
        return False
    y = torch.empty_like(x)
    norm = formula.of(weights["weight"], weights.get("bias"))
    kernels[x.dtype].apply(norm, array_of(x), array_of(y))
    return same_but_for_rounding(y, expected)
