"""Tensors that know where their elements lie in a checkpoint, and have no elements themselves.

transformers' own loader moves them as it would move a checkpoint's tensors. What it did is seen from the places of the
model's parameters afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from flashclient.tensors.places import Joined, Piece, Place, Shape, UntraceableError, join, stack

aten = torch.ops.aten


class TracedTensor(torch.Tensor):
    """A tensor on the meta device with a place."""

    place: Place

    @staticmethod
    def __new__(cls, place: Place, dtype: torch.dtype) -> TracedTensor:
        made = torch.Tensor._make_wrapper_subclass(cls, place.shape, dtype=dtype, device=torch.device("meta"))
        made.place = place
        return made

    @classmethod
    def whole(cls, name: str, shape: Shape, dtype: torch.dtype) -> TracedTensor:
        return cls(Piece.whole(name, shape), dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"TracedTensor({self.place})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        trace = _TRACED.get(func.overloadpacket)
        if trace is None:
            raise UntraceableError(f"{func} computes new values")
        dtype = next(t.dtype for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, TracedTensor))
        traced = trace(*args, **(kwargs or {}))
        if isinstance(traced, list):
            return [cls(place, dtype) for place in traced]
        return cls(traced, dtype)


def _same(tensor: TracedTensor, *_: object, **__: object) -> Place:
    return tensor.place


def _view(tensor: TracedTensor, shape: Iterable[int]) -> Place:
    sizes = list(shape)
    if -1 in sizes:
        known = -torch.Size(sizes).numel()
        sizes[sizes.index(-1)] = tensor.numel() // known
    return tensor.place.reshaped(tuple(sizes))


def _transpose(tensor: TracedTensor, first: int, second: int) -> Place:
    dims = list(range(tensor.dim()))
    dims[first], dims[second] = dims[second], dims[first]
    return tensor.place.permuted(dims)


def _permute(tensor: TracedTensor, dims: Iterable[int]) -> Place:
    return tensor.place.permuted([dim % tensor.dim() for dim in dims])


def _slice(
    tensor: TracedTensor, dim: int = 0, begin: int | None = None, end: int | None = None, step: int = 1
) -> Place:
    axis = dim % tensor.dim()
    first, last, step = slice(begin, end, step).indices(tensor.shape[axis])
    return tensor.place.sliced(axis, first, last, step)


def _select(tensor: TracedTensor, dim: int, index: int) -> Place:
    axis = dim % tensor.dim()
    return tensor.place.selected(axis, index % tensor.shape[axis])


def _split(tensor: TracedTensor, size: int, dim: int = 0) -> list[Place]:
    total = tensor.shape[dim]
    return _split_sizes(tensor, [min(size, total - begin) for begin in range(0, total, size)], dim)


def _split_sizes(tensor: TracedTensor, sizes: Iterable[int], dim: int = 0) -> list[Place]:
    places, begin = [], 0
    for size in sizes:
        places.append(tensor.place.sliced(dim % tensor.dim(), begin, begin + size))
        begin += size
    return places


def _unbind(tensor: TracedTensor, dim: int = 0) -> list[Place]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _cat(tensors: list[TracedTensor], dim: int = 0) -> Place:
    shapes = {(*t.shape[: dim % t.dim()], *t.shape[dim % t.dim() + 1 :]) for t in tensors}
    if len(shapes) > 1:
        raise UntraceableError(f"tensors of shapes {[list(t.shape) for t in tensors][:4]} cannot be concatenated")
    return join([tensor.place for tensor in tensors], dim % tensors[0].dim())


def _stack(tensors: list[TracedTensor], dim: int = 0) -> Joined:
    if len({t.shape for t in tensors}) > 1:
        raise UntraceableError(f"tensors of shapes {[list(t.shape) for t in tensors][:4]} cannot be stacked")
    return stack([tensor.place for tensor in tensors], dim % (tensors[0].dim() + 1))


def _unsqueeze(tensor: TracedTensor, dim: int) -> Place:
    axis = dim % (tensor.dim() + 1)
    return tensor.place.reshaped((*tensor.shape[:axis], 1, *tensor.shape[axis:]))


def _squeeze(tensor: TracedTensor, dim: int) -> Place:
    return _select(tensor, dim, 0) if tensor.shape[dim] == 1 else tensor.place


_TRACED: dict[Any, Callable[..., Place | list[Place]]] = {
    aten.alias: _same,
    aten.clone: _same,
    aten.detach: _same,
    aten._to_copy: _same,
    aten.view: _view,
    aten._unsafe_view: _view,
    aten.reshape: _view,
    aten.transpose: _transpose,
    aten.t: lambda tensor: _transpose(tensor, 0, 1),
    aten.permute: _permute,
    aten.slice: _slice,
    aten.select: _select,
    aten.split: _split,
    aten.split_with_sizes: _split_sizes,
    aten.unbind: _unbind,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
}
