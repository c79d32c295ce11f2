"""The weights of FFNs and tables, whose values are not in this process: they stay with weightd, on flash.

Each keeps its name, shape and dtype in the model, so code that counts, lists or compares parameters works. Code that
needs the values gets an AbsentWeightError, which says what to do instead. So no adapter, state_dict, conversion, copy
or gradient silently leaves the FFN out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashclient.errors import AbsentWeightError

CHANGE = "change the checkpoint and import it again, or load it with transformers where it fits into memory"
CONVERT = "the model runs on the CPU in its stored dtype; `weightd import --dtype` stores it in another"
SAVE = (
    "use the checkpoint that was imported; other weights that you changed can be saved with state_dict() of their "
    "modules, and adapters with peft's save_pretrained()"
)
COPY = "make another FlashClient: it shares the weights"
TRAIN = "train with transformers, merge what you trained into the checkpoint, and import that"
ADAPT = (
    "adapt only the attention, serve the adapter with `flashclient serve --lora-modules`, or merge it into the "
    "checkpoint and import that"
)

# The attributes and methods of a Tensor that do not need its values.
_FACTS = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "names", "requires_grad", "is_leaf", "grad"),
    *("grad_fn", "is_meta", "is_cpu", "is_cuda", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_xpu"),
    *("is_mps", "is_sparse_csr", "_version", "_grad", "_backward_hooks", "retains_grad", "output_nr"),
)
_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_floating_point", "is_complex"),
    *("is_contiguous", "get_device", "is_inference", "storage_offset", "is_signed", "is_conj", "is_neg"),
)
TELLING = {getattr(Tensor, name).__get__ for name in _FACTS if hasattr(Tensor, name)}
TELLING |= {getattr(Tensor, name) for name in _METHODS}
TELLING |= {torch.is_floating_point, torch.is_complex, torch.numel, torch.is_same_size}
_SELF = {Tensor.detach, torch.detach, Tensor.data.__get__, Tensor.contiguous, Tensor.cpu}  # type: ignore[attr-defined]
_SET_GRAD: Any = Tensor.grad.__set__  # type: ignore[union-attr]
_DTYPES = {
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
}


class AbsentWeight(nn.Parameter):
    """A parameter without values. Every torch function that needs them raises AbsentWeightError."""

    path: str
    instead = CHANGE

    @classmethod
    def of(cls, path: str, unmade: Tensor) -> AbsentWeight:
        """A weight of the name `path`, with the shape and dtype of `unmade`, which is on the meta device."""
        weight: AbsentWeight = Tensor._make_subclass(cls, unmade.detach().to("meta"), False)
        weight.path = path
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        weight = next((one for one in _flat(args) if isinstance(one, cls)), None)
        if func in TELLING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if weight is None:
            raise refused("a weight of an FFN", CHANGE)
        if func in _SELF or (func in _DTYPES and _DTYPES[func] == weight.dtype):
            return weight
        if func is Tensor.to or func in _DTYPES or func in (Tensor.cuda, Tensor.type):
            return weight._converted(func, args[1:], kwargs or {})
        if func in (Tensor.requires_grad_, Tensor.requires_grad.__set__):  # type: ignore[attr-defined]
            wanted = args[1] if len(args) > 1 else (kwargs or {}).get("requires_grad", True)
            if wanted:
                raise refused(f"{weight.path} cannot be trained", TRAIN)
            return weight
        if func is _SET_GRAD and args[1] is None:
            return None
        raise refused(f"{weight.path} has no values here ({getattr(func, '__name__', func)})", weight.instead)

    def _converted(self, func: Any, args: Any, kwargs: dict[str, Any]) -> AbsentWeight:
        """Returns the weight itself if dtype and device stay the same. Otherwise raises AbsentWeightError."""
        if func is Tensor.to and not any(isinstance(one, Tensor) for one in args):
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
            if (device is None or device.type == "cpu") and dtype in (None, self.dtype):
                return self
        raise refused(f"{self.path} cannot be converted or moved", CONVERT)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"AbsentWeight({self.path!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise refused(f"{self.path} cannot be copied", COPY)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise refused(f"{self.path} cannot be saved", SAVE)


class Unchangeable(nn.Module):
    """A part of an FFN that a streamed FFN stands for. The FFN is computed as a whole, so changes of it are refused."""

    path: str
    hookable = "the module of the FFN"

    def _no_hook(self, *_: Any, **__: Any) -> NoReturn:
        way = f"hook {self.hookable}, which computes all of it, or the decoder layer"
        raise refused(f"{self.path} takes no hooks", way)

    register_forward_hook = register_forward_pre_hook = _no_hook
    register_full_backward_hook = register_full_backward_pre_hook = register_backward_hook = _no_hook

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            raise refused(f"{self.path}.forward cannot be set", CHANGE)
        if name == "qconfig":  # of torch.ao.quantization
            raise refused(f"{self.path} cannot be quantised", CONVERT)
        super().__setattr__(name, value)


class NeverCalled(Unchangeable):
    """An activation or dropout of an FFN that is computed in its module's place."""

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise refused(f"{self.path} cannot be computed alone", f"call the module of the FFN; or {CHANGE}")


class HoldsAbsentWeights(nn.Module):
    """A module with absent parameters, which cannot be set, loaded, converted or taken away."""

    path: str

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        raise refused(f"{self.path} takes no other weights", CHANGE)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._parameters:
            raise refused(f"{self.path}.{name} cannot be set", CHANGE)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._parameters:
            raise refused(f"{self.path}.{name} cannot be removed", CHANGE)
        super().__delattr__(name)

    def refuse_change(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raises AbsentWeightError where `fn` would change an absent weight."""
        for weight in self._parameters.values():
            if isinstance(weight, AbsentWeight) and fn(weight) is not weight:
                raise refused(f"{self.path} cannot be converted or moved", CONVERT)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.refuse_change(fn)
        with self._without_absent():
            applied: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, weight in self._parameters.items():
            if isinstance(weight, AbsentWeight) and not isinstance(state_dict.get(prefix + name, weight), AbsentWeight):
                raise refused(f"{self.path}.{name} cannot be loaded", CHANGE)
        others = {name: one for name, one in state_dict.items() if not isinstance(one, AbsentWeight)}
        with self._without_absent():
            super()._load_from_state_dict(others, prefix, *rest)

    @contextmanager
    def _without_absent(self) -> Iterator[None]:
        all_of_them = dict(self._parameters)
        for name, weight in all_of_them.items():
            if isinstance(weight, AbsentWeight):
                del self._parameters[name]
        try:
            yield
        finally:
            all_of_them.update(self._parameters)
            self._parameters.clear()
            self._parameters.update(all_of_them)


class AbsentProjection(HoldsAbsentWeights, Unchangeable):
    """A projection whose matrix is absent."""

    def forward(self, x: Tensor) -> Tensor:
        raise refused(f"{self.path} cannot be computed alone", f"call the module of the FFN; or {CHANGE}")


class _FixedParts(nn.Module):
    """A module that refuses to set some of its parts, because a module that is put there would not be called."""

    fixed_parts: frozenset[str]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("fixed_parts", ()):
            raise refused(f"{name} of {type(self).__name__} cannot be replaced or adapted", ADAPT)
        super().__setattr__(name, value)


def fix(module: nn.Module, names: Iterable[str]) -> None:
    """Makes `module` refuse to set these attributes."""
    fixed = getattr(module, "fixed_parts", frozenset()).union(names)
    if not isinstance(module, _FixedParts):
        become(module, _FixedParts)
    module.__dict__["fixed_parts"] = fixed


def become(module: nn.Module, more: type[nn.Module]) -> None:
    """Makes `module` one of class `more` too, whose attributes come first. It stays the same object, with its parts.

    Its class keeps its name and base, so code that asks for the class goes on working.
    """
    module.__class__ = _joined(cast(Any, more), cast(Any, type(module)))


@cache
def _joined(more: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    return type(base.__name__, (more, base), {"__module__": base.__module__})


def make_absent(
    module: nn.Module,
    path: str,
    names: Iterable[str],
    more: type[HoldsAbsentWeights],
    of: Callable[[str, Tensor], AbsentWeight] = AbsentWeight.of,
) -> None:
    """Makes the parameters `names` of `module`, at `path` of the model, absent, and `module` one of class `more`."""
    for name in names:
        weight = module._parameters[name]
        assert weight is not None
        module._parameters[name] = of(f"{path}.{name}", weight)
    module.__dict__["path"] = path
    become(module, more)


class _NoGradient(torch.autograd.Function):
    """Returns y, and raises where a gradient would flow back to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise refused("no gradient flows through a streamed FFN", TRAIN)


def without_gradient(x: Tensor, y: Tensor) -> Tensor:
    """y, which kernels without gradients computed from x."""
    if torch.is_grad_enabled() and x.requires_grad:
        y = _NoGradient.apply(x, y)  # type: ignore[no-untyped-call]
    return y


def guard(model: PreTrainedModel) -> None:
    """Makes `model` and the models in it refuse what absent weights cannot do, before anything has changed.

    This is done on the instances: a new class would also be the class of models that others make from it.
    """

    def refuse(what: str, way: str) -> Callable[..., NoReturn]:
        def raises(*_: Any, **__: Any) -> NoReturn:
            raise refused(what, way)

        return raises

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            one: Any = module
            one.save_pretrained = refuse("a streamed model cannot be saved", SAVE)
            one.push_to_hub = refuse("a streamed model cannot be pushed", SAVE)
            one.__deepcopy__ = one.__copy__ = refuse("a streamed model cannot be copied", COPY)
            one.__reduce_ex__ = refuse("a streamed model cannot be pickled", COPY)
            one._apply = _Applied(module)


class _Applied:
    """nn.Module._apply of a model, absent weights first: where one refuses, nothing has been changed."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for module in self._module.modules():
            if isinstance(module, HoldsAbsentWeights):
                module.refuse_change(fn)
        applied: nn.Module = type(self._module)._apply(self._module, fn, recurse)  # type: ignore[no-untyped-call]
        return applied


def refused(what: str, way: str) -> AbsentWeightError:
    """What is refused, and what to do instead."""
    return AbsentWeightError(f"{what}: the weights stay with weightd; {way}")


def _flat(values: Any) -> list[Any]:
    found = []
    for value in values:
        found += _flat(value) if isinstance(value, list | tuple) else [value]
    return found
