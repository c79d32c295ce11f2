"""The FFN weights of a model, whose values are not in this process: they stay with weightd, on flash.

Each keeps its name, shape and dtype in the model, so code that counts, lists or compares parameters works. Code that
needs the values gets an AbsentWeightError, which says what to do instead. So no adapter, state_dict, conversion, copy
or gradient silently leaves the FFN out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashclient.errors import AbsentWeightError
from flashclient.torch_state import eager

CHANGE = "change the checkpoint and import it again, or load it with transformers where it fits into memory"
CONVERT = "the model runs on the CPU in its stored dtype; `weightd import --dtype` stores it in another"
SAVE = (
    "use the checkpoint that was imported; other weights that you changed can be saved with state_dict() of their "
    "modules, and adapters with peft's save_pretrained()"
)
COPY = "make another FlashClient: it shares the weights"
TRAIN = "train with transformers, merge what you trained into the checkpoint, and import that"
ADAPT = "adapt only the attention, or merge the adapter into the checkpoint and import that"

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
_TELLING = {getattr(Tensor, name).__get__ for name in _FACTS if hasattr(Tensor, name)}
_TELLING |= {getattr(Tensor, name) for name in _METHODS}
_TELLING |= {torch.is_floating_point, torch.is_complex, torch.numel, torch.is_same_size}
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

    @classmethod
    def of(cls, path: str, unmade: Tensor) -> AbsentWeight:
        """A weight of the name `path`, with the shape and dtype of `unmade`, which is on the meta device."""
        weight: AbsentWeight = Tensor._make_subclass(cls, unmade.detach().to("meta"), False)
        weight.path = path
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        weight = next((one for one in _flat(args) if isinstance(one, cls)), None)
        if func in _TELLING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if weight is None:
            raise _refused("a weight of an FFN", CHANGE)
        if func in _SELF or (func in _DTYPES and _DTYPES[func] == weight.dtype):
            return weight
        if func is Tensor.to or func in _DTYPES or func in (Tensor.cuda, Tensor.type):
            return weight._converted(func, args[1:], kwargs or {})
        if func in (Tensor.requires_grad_, Tensor.requires_grad.__set__):  # type: ignore[attr-defined]
            wanted = args[1] if len(args) > 1 else (kwargs or {}).get("requires_grad", True)
            if wanted:
                raise _refused(f"{weight.path} cannot be trained", TRAIN)
            return weight
        if func is _SET_GRAD and args[1] is None:
            return None
        raise _refused(f"{weight.path} has no values here ({getattr(func, '__name__', func)})", CHANGE)

    def _converted(self, func: Any, args: Any, kwargs: dict[str, Any]) -> AbsentWeight:
        """Returns the weight itself if dtype and device stay the same. Otherwise raises AbsentWeightError."""
        if func is Tensor.to and not any(isinstance(one, Tensor) for one in args):
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
            if (device is None or device.type == "cpu") and dtype in (None, self.dtype):
                return self
        raise _refused(f"{self.path} cannot be converted or moved", CONVERT)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"AbsentWeight({self.path!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise _refused(f"{self.path} cannot be copied", COPY)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise _refused(f"{self.path} cannot be saved", SAVE)


class _NeverCalled(nn.Module):
    """A part of an FFN. The FFN is computed as a whole, so changing the part or calling it is refused."""

    path: str
    hookable = "the module of the FFN"

    def forward(self, x: Tensor) -> Tensor:
        raise _refused(f"{self.path} cannot be computed alone", f"call the module of the FFN; or {CHANGE}")

    def _no_hook(self, *_: Any, **__: Any) -> NoReturn:
        way = f"hook {self.hookable}, which computes all of it, or the decoder layer"
        raise _refused(f"{self.path} takes no hooks", way)

    register_forward_hook = register_forward_pre_hook = _no_hook
    register_full_backward_hook = register_full_backward_pre_hook = register_backward_hook = _no_hook

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            raise _refused(f"{self.path}.forward cannot be set", CHANGE)
        if name == "qconfig":  # of torch.ao.quantization
            raise _refused(f"{self.path} cannot be quantised", CONVERT)
        super().__setattr__(name, value)


class AbsentProjection(_NeverCalled, nn.Linear):
    """Stands for a projection whose matrix is absent. It is never called, because the FFN is computed as a whole."""

    def __init__(self, path: str, unmade: nn.Module) -> None:
        nn.Module.__init__(self)
        weight: Tensor = unmade.weight  # type: ignore[assignment]
        self.path = path
        self.out_features, self.in_features = weight.shape
        self.weight = AbsentWeight.of(f"{path}.weight", weight)
        bias = getattr(unmade, "bias", None)
        self.register_parameter("bias", None if bias is None else AbsentWeight.of(f"{path}.bias", bias))
        self._is_made = True

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if "_is_made" in self.__dict__:
            raise _refused(f"{self.path} takes no other weights", CHANGE)
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias") and "_is_made" in self.__dict__:
            raise _refused(f"{self.path}.{name} cannot be set", CHANGE)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._parameters:
            raise _refused(f"{self.path}.{name} cannot be removed", CHANGE)
        super().__delattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AbsentProjection:
        for weight in self._parameters.values():
            if weight is not None and fn(weight) is not weight:
                raise _refused(f"{self.path} cannot be converted or moved", CONVERT)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in self._parameters:
            if not isinstance(state_dict.get(prefix + name, self.weight), AbsentWeight):
                raise _refused(f"{self.path}.{name} cannot be loaded", CHANGE)


class FirstOfTwo(AbsentProjection):
    """The first projection of a layer that calls both projections itself (OPT). It computes the whole FFN."""

    def __init__(self, path: str, unmade: nn.Module, ffn: nn.Module) -> None:
        super().__init__(path, unmade)
        self.ffn = ffn
        self.hookable = f"{path}.ffn"

    @eager
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ffn(x)
        y.passes_to = self  # type: ignore[attr-defined]
        return y


def absent_activation(path: str, activation: nn.Module) -> nn.Module:
    """Makes `activation` refuse calls, because the streamed FFN computes it; its class keeps its name and base."""
    base = type(activation)
    activation.__class__ = type(base.__name__, (_NeverCalled, base), {"__module__": base.__module__})
    activation.path = path  # type: ignore[assignment]
    return activation


class Between(_NeverCalled):
    """What the layer calls between the projections. It passes the output of `first` on, and refuses anything else."""

    def __init__(self, path: str, first: FirstOfTwo) -> None:
        super().__init__()
        self.path = path
        self.hookable = first.hookable
        self._first = [first]  # in a list, so that it is no submodule

    @eager
    def forward(self, x: Tensor) -> Tensor:
        if getattr(x, "passes_to", None) is not self._first[0]:
            raise _refused(f"{self.path} cannot be computed alone, and its input cannot be changed", CHANGE)
        return x


class LastOfTwo(AbsentProjection):
    """The second projection of such a layer."""

    def __init__(self, path: str, unmade: nn.Module, first: FirstOfTwo) -> None:
        super().__init__(path, unmade)
        self.hookable = first.hookable
        self._between = [Between(path, first)]

    @eager
    def forward(self, x: Tensor) -> Tensor:
        x = self._between[0](x)
        del x.passes_to  # type: ignore[attr-defined]
        return x


def fix(module: nn.Module, names: tuple[str, ...]) -> None:
    """Makes `module` refuse to set these attributes, because a module that is put there would not be called.

    The class of `module` becomes a subclass of the same name: there is no other way to guard an instance's attributes.
    """

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        if name in names:
            raise _refused(f"{name} of {type(self).__name__} cannot be replaced or adapted", ADAPT)
        base.__setattr__(self, name, value)

    base = type(module)
    fixed = type(base.__name__, (base,), {"__setattr__": set_attribute, "__module__": base.__module__})
    module.__class__ = fixed


class _NoGradient(torch.autograd.Function):
    """Returns y, and raises where a gradient would flow back to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise _refused("no gradient flows through a streamed FFN", TRAIN)


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
        def refused(*_: Any, **__: Any) -> NoReturn:
            raise _refused(what, way)

        return refused

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
            if isinstance(module, AbsentProjection):
                module._apply(fn)
        applied: nn.Module = type(self._module)._apply(self._module, fn, recurse)  # type: ignore[no-untyped-call]
        return applied


def _refused(what: str, way: str) -> AbsentWeightError:
    return AbsentWeightError(f"{what}: the FFN weights stay with weightd; {way}")


def _flat(values: Any) -> list[Any]:
    found = []
    for value in values:
        found += _flat(value) if isinstance(value, list | tuple) else [value]
    return found
