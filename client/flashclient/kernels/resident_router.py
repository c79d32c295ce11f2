"""Routers of mixtures by the native kernel. The picks of a row depend on that row alone, which torch's product does not
promise.

A module becomes native if it is a router: it has a matrix as weight and perhaps a bias, and returns logits, weights and
picks that are the kernel's for random inputs. The order of two experts with the same logit may differ.

Other routers, which pick by groups or by sigmoids (DeepSeek-V3, GLM-4.5), keep their forward. In it torch's product is
the kernel's, and torch's functions compute each element alone.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flashclient._native import Linear, Router, Routers, Workers
from flashclient.kernels.arrays import KernelOf, array_of
from flashclient.kernels.dtypes import KERNEL_DTYPES
from flashclient.kernels.resident_linear import ResidentLinear, apart
from flashclient.kernels.trials import (
    Native,
    has_plain_weights,
    has_tensors,
    make_native,
    random_tensors,
    same_but_for_rounding,
    scalars,
)

EXPERTS_MAX = 1024  # published: up to 512; larger matrices would take long to try
TRIED_ROWS = 16
TRIED_SCALES = (1.0, 0.01, 10.0)  # of logits, about
BY_ELEMENT = {torch.sigmoid, Tensor.sigmoid, nn.functional.softplus, nn.functional.silu}  # what routers take of torch


@dataclass(frozen=True)
class RouterFormula:
    """What a router returns; client/native/experts/router.h says what it computes.

    Attributes:
        normalised: the weights of a row are divided by their sum.
        dtype: of the weights.
    """

    picks: int
    normalised: bool
    dtype: torch.dtype

    def of(self, weight: Tensor, bias: Tensor | None) -> Router:
        """The native router with these weights, [experts, hidden] and [experts]."""
        arrays = (array_of(weight), None if bias is None else array_of(bias))
        return Router(*arrays, self.picks, self.normalised, self.dtype != torch.float32)


class NativeRouter(Native):
    """The forward pass of a router that became native. Other cases are left to the class that it had."""

    formula: RouterFormula
    router_kernels: KernelOf[Routers]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., hidden] -> logits [rows, experts], weights [rows, picks], picks [rows, picks]."""
        (x,) = (*args, *kwargs.values())
        if not self._is_for_kernel(x):
            result: tuple[Tensor, Tensor, Tensor] = super().forward(*args, **kwargs)
            return result
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        kernel, router = self.router_kernels[x.dtype], self.native_router()
        weight = self._parameters["weight"]
        assert weight is not None  # _is_for_kernel() has seen it
        logits = torch.empty(len(rows), len(weight), dtype=x.dtype, device="cpu")
        kernel.project(router, array_of(rows), array_of(logits))
        weights, picks = _picked(kernel, router, logits, self.formula.picks)
        return logits, weights.to(self.formula.dtype), picks

    def native_router(self) -> Router:
        """The router with the weights that the module has now."""
        weight, bias = self._parameters["weight"], self._parameters.get("bias")
        assert weight is not None  # _is_for_kernel() has seen it
        pointers = (weight.data_ptr(), None if bias is None else bias.data_ptr())
        held = self.__dict__.get("_held")
        if held is None or held[0] != pointers:
            held = self.__dict__["_held"] = (pointers, self.formula.of(weight, bias))
        router: Router = held[1]
        return router

    def is_plain(self, x: Tensor) -> bool:
        """Whether the kernel may compute what the module would, but for hooks."""
        weight = self._parameters.get("weight")
        return weight is not None and x.shape[-1] == weight.shape[1] and has_plain_weights(self, x)

    def _is_for_kernel(self, x: Tensor) -> bool:
        return not torch.compiler.is_compiling() and self.router_kernels.takes(x) and self.is_plain(x)


class _ByRow(TorchFunctionMode):
    """Inside it, torch's products and functions of single elements give a row the bits that it has alone."""

    def __init__(self, kernels: KernelOf[Linear]) -> None:
        super().__init__()
        self._kernels = kernels
        self.products = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if function is nn.functional.linear:
            made = self._product(*args, **named)
            if made is not None:
                self.products += 1
                return made
        if function in BY_ELEMENT and args:
            args = (apart(args[0]), *args[1:])
        return function(*args, **named)

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        same = all(one.dtype == input.dtype and one.is_contiguous() for one in (weight, bias) if one is not None)
        if not self._kernels.takes(input) or not same or weight.dim() != 2 or not weight.is_cpu:
            return None
        rows = input.reshape(-1, input.shape[-1]).contiguous()
        y = torch.empty(len(rows), len(weight), dtype=rows.dtype, device="cpu")
        added = None if bias is None else array_of(bias)
        self._kernels[rows.dtype].project(array_of(weight), added, array_of(rows), array_of(y))
        return y.view(*input.shape[:-1], len(weight))


class RouterByRow(Native):
    """The forward pass that a router has, each row as if it were alone: for routers whose formula no kernel has."""

    product_kernels: KernelOf[Linear]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the class which the module had."""
        given = (*args, *kwargs.values(), *self._parameters.values())
        with_gradient = torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in given)
        if torch.compiler.is_compiling() or with_gradient:
            return super().forward(*args, **kwargs)
        with _ByRow(self.product_kernels):
            return super().forward(*args, **kwargs)


def use_native_routers(model: nn.Module, workers: Workers, instruction_set: str | None = None) -> int:
    """Makes every router of `model` native whose formula the kernel has.

    Args:
        workers: shared with the other kernels.
        instruction_set: of the names in native/kernels/kernels.h; None takes the best.

    Returns:
        The number of modules changed.

    Raises:
        ValueError: the processor does not have `instruction_set`.
    """
    kernels = KernelOf({dtype: Routers(workers, name, instruction_set) for dtype, name in KERNEL_DTYPES.items()})

    products = KernelOf({dtype: Linear(workers, name, instruction_set) for dtype, name in KERNEL_DTYPES.items()})

    def find(module: nn.Module) -> dict[str, Any] | None:
        formula = _formula_of(module, kernels)
        return None if formula is None else {"formula": formula, "router_kernels": kernels}

    def find_other(module: nn.Module) -> dict[str, Any] | None:
        return {"product_kernels": products} if _multiplies(module, products) else None

    return make_native(model, NativeRouter, _key, find) + make_native(model, RouterByRow, _other_key, find_other)


def _key(module: nn.Module) -> Any:
    """What decides whether a module is a router, but for the values of its weights; None: it cannot be one."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    plain = (
        weight is not None
        and set(module._parameters) <= {"weight", "bias"}
        and not isinstance(module, nn.Linear | nn.Embedding)
        and not has_tensors(module)
        and next(module.children(), None) is None
        and weight.dim() == 2
        and weight.shape[0] <= EXPERTS_MAX
        and weight.dtype in KERNEL_DTYPES
        and all(type(one) is nn.Parameter and one.is_cpu for one in (weight, bias) if one is not None)
    )
    return (
        (type(module), weight.shape, weight.dtype, bias is None, scalars(module))
        if plain and weight is not None
        else None
    )


def _other_key(module: nn.Module) -> Any:
    """Like _key(), for a router that may have other vectors, too."""
    weight = module._parameters.get("weight")
    plain = (
        weight is not None
        and not isinstance(module, nn.Embedding)
        and not any(isinstance(one, Native | ResidentLinear) or type(one) is nn.Linear for one in module.modules())
        and type(weight) is nn.Parameter
        and weight.is_cpu
        and weight.dim() == 2
        and weight.shape[0] <= EXPERTS_MAX
        and weight.dtype in KERNEL_DTYPES
    )
    return (type(module), weight.shape, weight.dtype) if plain and weight is not None else None


def _multiplies(module: nn.Module, kernels: KernelOf[Linear]) -> bool:
    """Whether the module multiplies rows by a matrix, in a product that the kernel takes."""
    weight = module._parameters["weight"]
    assert weight is not None  # _other_key() has seen it
    some = random_tensors(weight.dtype)
    needed = [one for one in inspect.signature(module.forward).parameters.values() if one.default is one.empty]
    vectors = [some(len(weight)) for one in needed[1:] if one.kind is one.POSITIONAL_OR_KEYWORD]  # added to scores
    try:
        with torch.no_grad(), _ByRow(kernels) as watched:
            module(some(TRIED_ROWS, weight.shape[1]), *vectors)
    except Exception:  # whatever a module raises that was not made for this
        return False
    return bool(watched.products)


def _formula_of(module: nn.Module, kernels: dict[torch.dtype, Routers]) -> RouterFormula | None:
    """What the module computes, if it is a router. It is tried with random weights and rows."""
    weight = module._parameters["weight"]
    assert weight is not None  # _key() has seen it
    experts, hidden = weight.shape
    some = random_tensors(weight.dtype)
    weights = {name: some(*one.shape) for name, one in module._parameters.items() if one is not None}
    weights["weight"] *= hidden**-0.5
    x = torch.cat([some(TRIED_ROWS, hidden) * scale for scale in TRIED_SCALES])
    try:
        logits, scores, picks = torch.func.functional_call(module, weights, (x,))
    except Exception:  # whatever a module raises that was not made for this
        return None
    if not all(isinstance(one, Tensor) for one in (logits, scores, picks)):
        return None
    shapes = (logits.shape == (len(x), experts), picks.dim() == 2 and len(picks) == len(x), scores.shape == picks.shape)
    if not all(shapes) or (logits.dtype, picks.dtype) != (x.dtype, torch.int64):
        return None
    if scores.dtype not in (x.dtype, torch.float32):
        return None
    kernel = kernels[x.dtype]
    for normalised in (False, True):
        formula = RouterFormula(picks.shape[1], normalised, scores.dtype)
        router = formula.of(weights["weight"], weights.get("bias"))
        made = torch.empty_like(logits)
        kernel.project(router, array_of(x), array_of(made))
        weighted, picked = _picked(kernel, router, logits.contiguous(), formula.picks)
        same_picks = torch.equal(logits.gather(1, picked), logits.gather(1, picks))
        if not same_picks or not same_but_for_rounding(made, logits):
            return None
        if same_but_for_rounding(weighted.to(scores.dtype), scores):
            return formula
    return None


def _picked(kernel: Routers, router: Router, logits: Tensor, picks: int) -> tuple[Tensor, Tensor]:
    weights = torch.empty(len(logits), picks, dtype=torch.float32, device="cpu")
    picked = torch.empty(len(logits), picks, dtype=torch.int64, device="cpu")
    kernel.pick(router, array_of(logits), array_of(weights), array_of(picked))
    return weights, picked
