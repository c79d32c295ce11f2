"""FFNs that a module computes in parts: it calls the projections, and what comes between them, itself.

The first projection that is called computes the whole FFN from its input. It returns a PendingProjection, which stands
for the rows' products. What the module does with it is written down and not computed. The last projection returns the
FFN's output where that was the activation of the record, which is tried once with numbers, in float64. Anything else
is refused: a hook that scales a product, an adapter, or a module whose class computes something else by now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from flashclient.errors import AbsentWeightError
from flashclient.model.absent_weights import CHANGE, TELLING, AbsentProjection, Unchangeable, refused
from flashclient.model.activations import neurons_of
from flashclient.torch_state import plain_torch
from weightd_proto.weightd_pb2 import Activation

TRIED_ROWS = 4  # of random products, for all neurons
TOLERANCE = 1e-4  # constants in fp32, and formulas of the same function

# Functions that keep the order of the elements. What they return is the same products.
_RESHAPES: set[Any] = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten}
_RESHAPES |= {Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze, torch.squeeze}
_SAME: set[Any] = {Tensor.contiguous, Tensor.clone, torch.clone, Tensor.detach, torch.detach}
_SAME |= {functional.dropout}  # of training, which needs gradients
_SAME |= {Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double}
# Functions that take some elements of each row, and the position of their argument `dim`.
_SPLITS: dict[Any, int] = {
    **dict.fromkeys((Tensor.chunk, torch.chunk, Tensor.split, torch.split, torch.tensor_split), 2),
    **dict.fromkeys((Tensor.narrow, torch.narrow, functional.glu), 1),
}
_READS: set[Any] = {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__float__, Tensor.__int__}
_READS |= {Tensor.__index__, Tensor.__iter__, Tensor.__contains__, Tensor.__setitem__, Tensor.__array__}
_READS |= {Tensor.__reduce_ex__, Tensor.__deepcopy__}
_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}


# Ways to lay out a fused matrix of n neurons, as a trial finds them: the rows of a part whose neurons are
# `order`; `second` says that it is up.
FUSED_FORMS: tuple[Callable[[bool, int, Tensor], Tensor], ...] = (
    lambda second, n, order: order + n * second,
    lambda second, n, order: order + n * (not second),
    lambda second, n, order: 2 * order + second,
    lambda second, n, order: 2 * order + (not second),
)


class _Rows(NamedTuple):
    """The products with the rows of these parts: of a fused matrix, gate and up."""

    parts: tuple[str, ...]


class _Cut(NamedTuple):
    """A slice."""

    start: Any
    stop: Any
    step: Any


class _Number(NamedTuple):
    """A tensor of one element, which some functions take only as such."""

    value: float
    shape: tuple[int, ...]


class _Done(NamedTuple):
    """What was done: the result of `function`, or the one of its results that `taken` says."""

    function: Any
    arguments: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...] = ()
    taken: int | None = None


class OtherActivationError(AbsentWeightError):
    """A module does not compute the activation of the record between its projections."""


@dataclass
class _FfnCall:
    """One call of the FFN.

    Attributes:
        x: its input.
        y: its output.
        begun: the parts whose projections were called.
    """

    x: Tensor
    y: Tensor
    begun: set[str] = field(default_factory=set)

    def continues(self, parts: Sequence[str], x: Tensor) -> bool:
        same = self.x is x or (
            (self.x.data_ptr(), self.x.shape, self.x.stride(), self.x.dtype)
            == (x.data_ptr(), x.shape, x.stride(), x.dtype)
        )
        return same and self.begun.isdisjoint(parts)


class PendingProjection(Tensor):
    """Stands for products that are not computed: without values, on the meta device.

    Attributes:
        plain: a tensor of the same shape.
        done: what the module has done with the products of the rows so far.
    """

    plain: Tensor
    site: PartsOfFFN
    call: _FfnCall
    done: Any

    @classmethod
    def of(cls, plain: Tensor, site: PartsOfFFN, call: _FfnCall, done: Any) -> PendingProjection:
        made: PendingProjection = Tensor._make_subclass(cls, plain)
        made.plain, made.site, made.call, made.done = plain, site, call, done
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TELLING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        pending = next((one for one in (*args, *(kwargs or {}).values()) if isinstance(one, cls)), None)
        if pending is None or func in _READS:
            raise refused("what an FFN computes between its projections cannot be read", CHANGE)
        return pending._after(func, args, kwargs or {})

    def _after(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func in _SAME:
            return self
        if func in _RESHAPES:
            return self._reshaped(func, args, kwargs)
        if func is Tensor.__getitem__:
            return self._taken(args[1])
        if func in _SPLITS:
            return self._split(func, args, kwargs)
        named = tuple((name, self._argument(one)) for name, one in kwargs.items())
        done = _Done(func, tuple(self._argument(one) for one in args), named)
        name = getattr(func, "__name__", "")
        if kwargs.get("inplace") or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            args[0].done = done
            return args[0]
        return self._like(self.plain, done)

    def _reshaped(self, func: Any, args: Any, kwargs: dict[str, Any]) -> PendingProjection:
        made: Tensor = func(self.plain, *args[1:], **kwargs)
        if made.shape[-1:] != self.plain.shape[-1:]:
            raise self._refused(func)
        return self._like(made, self.done)

    def _taken(self, index: Any) -> PendingProjection:
        *before, last = index if isinstance(index, tuple) else (index,)
        whole = all(one is Ellipsis or (isinstance(one, slice) and one == slice(None)) for one in before)
        reaches_last = any(one is Ellipsis for one in before) or len(before) == self.plain.dim() - 1
        if not whole or not reaches_last or not isinstance(last, slice):
            raise self._refused(Tensor.__getitem__)
        cut = _Cut(last.start, last.stop, last.step)
        return self._like(self.plain[index], _Done(Tensor.__getitem__, (self.done, (Ellipsis, cut))))

    def _split(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        at = _SPLITS[func]
        dim = kwargs.get("dim", args[at] if len(args) > at else -1 if func is functional.glu else 0)
        if dim % self.plain.dim() != self.plain.dim() - 1:
            raise self._refused(func)
        made = func(self.plain, *args[1:], **kwargs)
        arguments = [self._argument(one) for one in args]
        named = {name: self._argument(one) for name, one in kwargs.items()}
        if "dim" in named or len(arguments) <= at:
            named["dim"] = -1
        else:
            arguments[at] = -1
        done = _Done(func, tuple(arguments), tuple(named.items()))
        if isinstance(made, Tensor):
            return self._like(made, done)
        return tuple(self._like(one, done._replace(taken=number)) for number, one in enumerate(made))

    def _argument(self, one: Any) -> Any:
        if isinstance(one, PendingProjection):
            if one.call is not self.call:
                raise refused("two FFNs, or two calls of one, cannot be mixed", CHANGE)
            return one.done
        if isinstance(one, Tensor):
            if one.numel() != 1:
                raise refused("what an FFN computes between its projections takes no other tensors", CHANGE)
            return _Number(one.item(), tuple(one.shape))
        if isinstance(one, list | tuple):
            return tuple(self._argument(each) for each in one)
        return one

    def _like(self, plain: Tensor, done: Any) -> PendingProjection:
        return PendingProjection.of(plain, self.site, self.call, done)

    def _refused(self, func: Any) -> AbsentWeightError:
        name = getattr(func, "__name__", func)
        return refused(f"{name} of what an FFN computes between its projections mixes neurons or tokens", CHANGE)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PendingProjection(shape={tuple(self.plain.shape)})"

    __format__ = object.__format__


class PartsOfFFN:
    """The FFN of one layer, whose parts its module calls.

    Attributes:
        path: of the module.
        neurons: their number.
        activation: that of the model.
        gated: whether the activation takes products with gate rows and up rows.
        form: the one of FUSED_FORMS that a fused matrix has, once it was tried.
    """

    # What was tried and is right, for all layers and models, and the form that fits.
    _known: dict[tuple[Any, ...], int | None] = {}  # noqa: RUF012

    def __init__(self, path: str, neurons: int, activation: Activation, gated: bool) -> None:
        self.path = path
        self.neurons = neurons
        self.gated = gated
        self.form: int | None = None
        self._activation = activation
        self._key = (activation.SerializeToString(), neurons, gated)
        self._call: _FfnCall | None = None
        self._known_here: Any = None  # what the module has done the last time
        self._plain: dict[tuple[str, ...], Tensor] = {}  # by parts, of the last shape

    def begin(self, parts: tuple[str, ...], x: Tensor, ffn: Callable[[Tensor], Tensor]) -> PendingProjection:
        """What the projection that holds `parts` returns for x [..., hidden_size]."""
        call = self._call
        if call is None or not call.continues(parts, x):
            call = self._call = _FfnCall(x, ffn(x))
        call.begun.update(parts)
        shape = (*x.shape[:-1], self.neurons * len(parts))
        plain = self._plain.get(parts)
        if plain is None or plain.shape != shape or plain.dtype != call.y.dtype:
            plain = self._plain[parts] = torch.empty(shape, dtype=call.y.dtype, device="meta")
        return PendingProjection.of(plain, self, call, _Rows(parts))

    def finish(self, h: Any) -> Tensor:
        """The FFN's output, in the shape of `h`, where `h` is the neurons' outputs of the call begun last.

        Raises:
            AbsentWeightError: it is not.
        """
        call, self._call = self._call, None
        if not isinstance(h, PendingProjection) or h.site is not self or h.call is not call or call is None:
            what = f"{self.path} computes its FFN as a whole, so what enters its last projection is fixed"
            raise refused(what, CHANGE)
        shape = h.plain.shape
        if h.done is not self._known_here and (key := (*self._key, h.done)) not in self._known:
            form = None if self._activation.instead else self._form_of(h.done)
            if shape[-1] != self.neurons or (form is None and not self._activation.instead):
                what = f"{self.path} does not compute {self._activation.function} between its projections"
                raise OtherActivationError(f"{what}; {CHANGE}")
            self._known[key] = form
        if h.done is not self._known_here:
            self._known_here, self.form = h.done, self._known[(*self._key, h.done)]
        return call.y if shape[:-1] == call.y.shape[:-1] else call.y.view(*shape[:-1], -1)

    def _form_of(self, done: Any) -> int | None:
        """Tries the activation with random products. Which rows of a fused matrix are the gate's is not known: one of
        FUSED_FORMS must fit. None where it does not."""
        random = torch.Generator("cpu").manual_seed(0)
        with torch.no_grad(), plain_torch():
            shape = (2, TRIED_ROWS, self.neurons)
            scale = torch.tensor([0.5, 3.0, 10.0, 40.0], dtype=torch.float64, device="cpu")[:, None]
            gate, up = torch.randn(shape, generator=random, dtype=torch.float64, device="cpu") * scale
            expected = neurons_of(self._activation, gate, up if self.gated else None)
            fused = (
                torch.cat([gate, up], -1),
                torch.cat([up, gate], -1),
                torch.stack([gate, up], -1).flatten(-2),
                torch.stack([up, gate], -1).flatten(-2),
            )
            alone = {("gate",): gate, ("up",): up if self.gated else gate}
            fits = (_repeats(done, alone | {("gate", "up"): both}, expected) for both in fused)
            return next((form for form, fitting in enumerate(fits) if fitting), None)


def _repeats(done: Any, products: dict[tuple[str, ...], Tensor], expected: Tensor) -> bool:
    try:
        made = _repeated(done, products)
    except (RuntimeError, TypeError, ValueError, IndexError):  # of sizes that do not fit
        return False
    fits = isinstance(made, Tensor) and made.shape == expected.shape
    return fits and torch.allclose(made.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def _repeated(done: Any, products: dict[tuple[str, ...], Tensor]) -> Any:
    """The result of what was done, with these products."""
    if isinstance(done, _Rows):
        return products[done.parts].clone()  # some functions work in place
    if isinstance(done, _Cut):
        return slice(*done)
    if isinstance(done, _Number):
        return torch.full(done.shape, done.value, dtype=torch.float64, device="cpu")
    if isinstance(done, _Done):
        arguments = [_repeated(one, products) for one in done.arguments]
        made = done.function(*arguments, **{name: _repeated(one, products) for name, one in done.named})
        return made if done.taken is None else made[done.taken]
    return tuple(_repeated(one, products) for one in done) if isinstance(done, tuple) else done


class FirstProjection(AbsentProjection):
    """A projection before the activation.

    Attributes:
        parts: those whose rows it holds.
        ffn: computes the whole FFN.
    """

    parts: tuple[str, ...]
    site: PartsOfFFN
    ffn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.site.begin(self.parts, x, self.ffn)


class LastProjection(AbsentProjection):
    """The projection after the activation."""

    site: PartsOfFFN

    def forward(self, x: Tensor) -> Tensor:
        return self.site.finish(x)


class BetweenProjections(Unchangeable):
    """An activation that the module calls between them.

    Attributes:
        before, after: what was done before its last call, and after it.
    """

    before: Any = None
    after: Any = None

    def forward(self, x: Any) -> Any:
        if not isinstance(x, PendingProjection):
            raise refused(f"{self.path} cannot be computed alone, and its input cannot be changed", CHANGE)
        if x.done == self.before:  # nearly always
            return PendingProjection.of(x.plain, x.site, x.call, self.after)
        made = super().forward(x)
        if isinstance(made, PendingProjection) and made.plain is x.plain:
            self.__dict__.update(before=x.done, after=made.done)
        return made
