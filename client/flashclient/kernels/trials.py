"""How modules of transformers become native: their class changes to a subclass, after a trial has shown the formula."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from collections.abc import Set as AbstractSet
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers.utils import output_capturing

from flashclient.kernels.encoded_matrix import WeightInBlocks

DIFFERENT_SHARE_MAX = 0.02  # of the elements: sums in another order may round differently
# What a pass may collect from modules that no native one stands for.
COLLECTED_ELSEWHERE = frozenset({"hidden_states", "_hidden_states_layers", "router_logits"})


class Native(nn.Module):
    """A module that became native. What it holds for the kernels stays out of copies."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_held"}


@cache
def native_class(native: Any, kind: Any) -> Any:
    """A subclass of `kind` with the forward of `native`. It has the name of `kind`."""
    return type(kind.__name__, (native, kind), {"__module__": kind.__module__})


def make_native(
    model: nn.Module,
    native: Any,
    key_of: Callable[[Any], Hashable | None],
    find: Callable[[Any], dict[str, Any] | None],
) -> int:
    """Makes the modules of `model` native for which `find` finds something. Returns their number.

    Only their class changes, to a subclass of the one that they had. They stay the same objects under the same names,
    with their hooks and weights.

    Args:
        native: the subclass of Native whose forward they get.
        key_of: what decides for a module, but for the values of its weights: one trial serves all with the same. None:
            it cannot become native.
        find: tries a module; returns the attributes of `native`, or None.
    """
    known: dict[Hashable, dict[str, Any] | None] = {}
    changed = 0
    for module in list(model.modules()):
        key = None if isinstance(module, native) else key_of(module)
        if key is None:
            continue
        if key not in known:
            known[key] = find(module)
        if (found := known[key]) is not None:
            kind: Any = type(module)  # hashable, which mypy does not see
            module.__class__ = native_class(native, kind)
            module.__dict__.update(found)
            changed += 1
    return changed


def scalars(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The attributes that may make two modules of a class compute different things."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int | float | str | bool | tuple | None) and name != "layer_idx"
    }
    return tuple(sorted(plain.items(), key=str))


def has_tensors(module: nn.Module) -> bool:
    """Whether the module has buffers or other tensors, whose values may differ from module to module."""
    return bool(module._buffers) or any(isinstance(value, Tensor) for value in vars(module).values())


def is_called_alone(module: nn.Module, elsewhere: AbstractSet[str] = COLLECTED_ELSEWHERE) -> bool:
    """Whether calling the module is calling its forward, in this pass.

    Args:
        elsewhere: what a pass may collect, because it is not collected from this module.
    """
    if "forward" in module.__dict__ or module._forward_pre_hooks:
        return False
    return not module._forward_hooks or all(_is_idle(one, elsewhere) for one in module._forward_hooks.values())


def _is_idle(hook: Any, elsewhere: AbstractSet[str]) -> bool:
    """Whether a hook is one of transformers' that collect outputs, which stay for ever, and collects nothing now."""
    if getattr(hook, "__module__", None) != output_capturing.__name__:
        return False
    collected = output_capturing._active_collector.get()  # type: ignore[no-untyped-call]
    return collected is None or set(collected) <= elsewhere


def hooked_everywhere() -> bool:
    """Whether there are hooks for the modules of all models."""
    return bool(torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks)


class SeenModules:
    """Modules and their weights as they were once, with no hooks and not in training.

    Args:
        places: of the modules: the children among which each is, and its name.
    """

    def __init__(self, places: Iterable[tuple[dict[str, Any], str]]) -> None:
        self._places = [(children, name, children[name], vars(children[name])) for children, name in places]
        modules: list[nn.Module] = [module for _, _, module, _ in self._places]
        self._hooks = [one for module in modules for one in (module._forward_hooks, module._forward_pre_hooks)]
        self._weights = [
            (module._parameters, name, weight, 0 if weight is None else weight.data_ptr())
            for module in modules
            for name, weight in module._parameters.items()
        ]

    def are_unchanged(self) -> bool:
        """Whether all is as it was. Each layer asks for each token, and finds its modules no more in the caches."""
        for hooks in self._hooks:
            if hooks:
                return False
        for children, name, module, attributes in self._places:
            if children.get(name) is not module or "forward" in attributes or attributes["training"]:
                return False
        for parameters, name, weight, pointer in self._weights:
            if parameters.get(name) is not weight or (weight is not None and weight.data_ptr() != pointer):
                return False
        return True


def is_plain(
    module: nn.Module | None, kind: type[nn.Module], x: Tensor, bias_dtypes: tuple[torch.dtype, ...] = ()
) -> bool:
    """Whether the kernels may compute what calling the module with `x` would.

    Args:
        kind: the class that it must be of.
        bias_dtypes: that a bias may have beside the dtype of x.
    """
    if not isinstance(module, kind) or hooked_everywhere() or not is_called_alone(module):
        return False
    return has_plain_weights(module, x, bias_dtypes)


def has_plain_weights(module: nn.Module, x: Tensor, bias_dtypes: tuple[torch.dtype, ...] = ()) -> bool:
    """Whether the weights are as the kernels take them, and neither they nor x need a gradient. See is_plain()."""
    with_gradient = torch.is_grad_enabled()
    if module._parameters.get("weight") is None or (with_gradient and x.requires_grad):
        return False
    for name, one in module._parameters.items():
        if one is None:
            continue
        dtypes = (x.dtype, *bias_dtypes) if name == "bias" else (x.dtype,)
        plain = type(one) is nn.Parameter and one.is_cpu and one.is_contiguous()
        if one.dtype not in dtypes or not (plain or isinstance(one, WeightInBlocks)):
            return False
        if with_gradient and one.requires_grad:
            return False
    return True


def random_tensors(dtype: torch.dtype, seed: int = 0) -> Callable[..., Tensor]:
    """A function that makes random tensors of a shape, the same ones for each trial."""
    random = torch.Generator("cpu").manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu").to(dtype)

    return some


def random_angles(width: int, sequences: int, tokens: int, some: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Cos and sin, [sequences, tokens, width]. Both halves are alike, as those of transformers are."""
    half = some(sequences, tokens, width // 2) * 3
    both = torch.cat([half, half], dim=-1)
    return both.cos(), both.sin()


def same_but_for_rounding(actual: Tensor, expected: Tensor) -> bool:
    """Whether two results of one formula differ by no more than sums in another order do."""
    unit = torch.finfo(expected.dtype).eps
    greatest = float(expected.abs().max())
    if expected.dtype == torch.float32:
        return torch.allclose(actual, expected, rtol=16 * unit, atol=16 * unit * greatest)
    different = (actual != expected).float().mean().item()
    close = torch.allclose(actual.float(), expected.float(), rtol=2 * unit, atol=unit * greatest)
    return close and different <= DIFFERENT_SHARE_MAX
