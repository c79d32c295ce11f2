"""Where the elements of a tensor lie in a checkpoint, as slices of the checkpoint's tensors.

A Piece is a strided view of one tensor of the checkpoint. A Joined place consists of several places side by side.
Slicing, transposing and reshaping a place gives another place, and touches no elements. What cannot be told in this way
raises UntraceableError.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Self

import torch

from flashclient.errors import ModelError
from weightd_proto import tensor_sources
from weightd_proto.weightd_pb2 import Concatenated, MatrixSource, Slice, TensorSource, Transposed

Shape = tuple[int, ...]


class UntraceableError(ModelError):
    """Elements that are not slices of the checkpoint's tensors, or not in an order that an import can follow."""


@dataclass(frozen=True)
class Piece:
    """A view of a tensor of the checkpoint. The offset and the strides count elements of the tensor."""

    tensor: str
    tensor_shape: Shape
    offset: int
    shape: Shape
    strides: Shape

    @classmethod
    def whole(cls, tensor: str, shape: Shape) -> Self:
        return cls(tensor, shape, 0, shape, _row_major(shape))

    def sliced(self, dim: int, begin: int, end: int, step: int = 1) -> Piece:
        count = len(range(begin, end, step))
        offset = self.offset + begin * self.strides[dim]
        strides = _with(self.strides, dim, self.strides[dim] * step)
        return replace(self, offset=offset, shape=_with(self.shape, dim, count), strides=strides)

    def selected(self, dim: int, index: int) -> Piece:
        offset = self.offset + index * self.strides[dim]
        return replace(self, offset=offset, shape=_without(self.shape, dim), strides=_without(self.strides, dim))

    def permuted(self, dims: Sequence[int]) -> Piece:
        shape, strides = tuple(self.shape[dim] for dim in dims), tuple(self.strides[dim] for dim in dims)
        return replace(self, shape=shape, strides=strides)

    def reshaped(self, shape: Shape) -> Place:
        """Merges dimensions that are not adjacent in memory, too, if they are the only ones that change."""
        strides = _strides_as(self.shape, self.strides, shape)
        if strides is not None:
            return replace(self, shape=shape, strides=strides)
        before = _equal_at_start(self.shape, shape)
        after = _equal_at_start(self.shape[before:][::-1], shape[before:][::-1])
        if len(shape) - before - after != 1:
            raise UntraceableError(f"{self.tensor}, seen as {list(self.shape)}, cannot be told as {list(shape)}")
        count = self.shape[before]
        inner = _with(shape, before, shape[before] // count)
        return join([self.selected(before, index).reshaped(inner) for index in range(count)], before)


@dataclass(frozen=True)
class Joined:
    """Places along an existing dimension, or stacked along a new one."""

    dim: int
    stacked: bool
    parts: tuple[Place, ...]

    @cached_property
    def shape(self) -> Shape:
        first = self.parts[0].shape
        if self.stacked:
            return (*first[: self.dim], len(self.parts), *first[self.dim :])
        return _with(first, self.dim, sum(part.shape[self.dim] for part in self.parts))

    def sliced(self, dim: int, begin: int, end: int, step: int = 1) -> Place:
        if dim != self.dim:
            inner = self._inner(dim)
            return self._with_parts([part.sliced(inner, begin, end, step) for part in self.parts])
        if self.stacked:
            return self._with_parts(self.parts[begin:end:step])
        parts = []
        for first, part in self._offsets():
            last = min(end, first + part.shape[dim])
            start = begin + max(0, -(-(first - begin) // step)) * step
            if start < last:
                parts.append(part.sliced(dim, start - first, last - first, step))
        return join(parts, dim)

    def selected(self, dim: int, index: int) -> Place:
        if dim != self.dim:
            inner = self._inner(dim)
            return Joined(
                self.dim - (dim < self.dim), self.stacked, tuple(part.selected(inner, index) for part in self.parts)
            )
        if self.stacked:
            return self.parts[index]
        first, part = next((o, part) for o, part in self._offsets() if index < o + part.shape[dim])
        return part.selected(dim, index - first)

    def permuted(self, dims: Sequence[int]) -> Place:
        inner = [self._inner(dim) for dim in dims if not (self.stacked and dim == self.dim)]
        return Joined(list(dims).index(self.dim), self.stacked, tuple(part.permuted(inner) for part in self.parts))

    def reshaped(self, shape: Shape) -> Place:
        """Divides what lies before the joined dimension anew, and that dimension with what follows it, part by part."""
        outer, inner = prod(self.shape[: self.dim]), prod(self.shape[self.dim :])
        elements = [prod(part.shape[self.dim :]) for part in self.parts]
        for dim in range(len(shape)):
            each = prod(shape[dim + 1 :])
            if prod(shape[:dim]) != outer or each * shape[dim] != inner or any(count % each for count in elements):
                continue
            if self.stacked and shape[dim] == len(self.parts):
                return Joined(dim, True, tuple(part.reshaped(_without(shape, dim)) for part in self.parts))
            sized = zip(self.parts, elements, strict=True)
            return join([part.reshaped(_with(shape, dim, count // each)) for part, count in sized], dim)
        raise UntraceableError(f"joined tensors of shape {list(self.shape)} cannot be told as {list(shape)}")

    def _inner(self, dim: int) -> int:
        """A dimension of the whole as one of the parts."""
        return dim - (self.stacked and dim > self.dim)

    def _with_parts(self, parts: Sequence[Place]) -> Joined:
        return Joined(self.dim, self.stacked, tuple(parts))

    def _offsets(self) -> Iterator[tuple[int, Place]]:
        offset = 0
        for part in self.parts:
            yield offset, part
            offset += part.shape[self.dim]


@dataclass(frozen=True)
class Interleaved:
    """Places whose slices along a dimension alternate: the first of each place, the second of each, and so on."""

    dim: int
    parts: tuple[Place, ...]

    @property
    def shape(self) -> Shape:
        first = self.parts[0].shape
        return _with(first, self.dim, first[self.dim] * len(self.parts))

    def sliced(self, dim: int, begin: int, end: int, step: int = 1) -> Place:
        if dim != self.dim:
            return Interleaved(self.dim, tuple(part.sliced(dim, begin, end, step) for part in self.parts))
        count = len(self.parts)
        if step % count:
            raise UntraceableError(f"a slice of interleaved tensors of shape {list(self.shape)} with a step of {step}")
        first, inner = begin // count, step // count
        end = first + (len(range(begin, end, step)) - 1) * inner + 1
        return self.parts[begin % count].sliced(dim, first, end, inner)

    def selected(self, dim: int, index: int) -> Place:
        if dim == self.dim:
            return self.parts[index % len(self.parts)].selected(dim, index // len(self.parts))
        return Interleaved(self.dim - (dim < self.dim), tuple(part.selected(dim, index) for part in self.parts))

    def permuted(self, dims: Sequence[int]) -> Place:
        return Interleaved(list(dims).index(self.dim), tuple(part.permuted(dims) for part in self.parts))

    def reshaped(self, shape: Shape) -> Place:
        if shape == self.shape:
            return self
        raise UntraceableError(f"interleaved tensors of shape {list(self.shape)} cannot be told as {list(shape)}")


Place = Piece | Joined | Interleaved


def join(parts: Sequence[Place], dim: int) -> Place:
    """The parts along an existing dimension. Neighbours that are adjacent in the same tensor become one."""
    merged: list[Place] = []
    for part in parts:
        for piece in part.parts if isinstance(part, Joined) and part.dim == dim and not part.stacked else (part,):
            last = merged[-1] if merged else None
            if isinstance(last, Piece) and isinstance(piece, Piece) and _continues(last, piece, dim):
                merged[-1] = replace(last, shape=_with(last.shape, dim, last.shape[dim] + piece.shape[dim]))
            else:
                merged.append(piece)
    if not merged:
        raise UntraceableError("a slice without elements")
    return merged[0] if len(merged) == 1 else Joined(dim, False, tuple(merged))


def stack(parts: Sequence[Place], dim: int) -> Joined:
    return Joined(dim, True, tuple(parts))


def message(place: Place) -> TensorSource:
    """The same place for an import, with its elements in the same order."""
    if isinstance(place, Interleaved):
        parts = [message(part) for part in place.parts]
        return TensorSource(concatenated=Concatenated(dim=place.dim + 1, stacked=True, parts=parts))
    if isinstance(place, Joined):
        parts = [message(part) for part in place.parts]
        return TensorSource(concatenated=Concatenated(dim=place.dim, stacked=place.stacked, parts=parts))
    return _piece_message(place)


def _piece_message(piece: Piece) -> TensorSource:
    if piece == Piece.whole(piece.tensor, piece.tensor_shape):
        return TensorSource(tensor=piece.tensor)
    dims = _dims_of(piece)
    source = TensorSource(tensor=piece.tensor)
    indices = _indices(piece.offset, piece.tensor_shape)
    strides = _row_major(piece.tensor_shape)
    for dim, (index, size) in enumerate(zip(indices, piece.tensor_shape, strict=True)):
        seen = dims.index(dim)
        count, step = piece.shape[seen], max(1, piece.strides[seen] // strides[dim])
        if (index, count) != (0, size):
            step = step if count > 1 else 1
            end = index + (count - 1) * step + 1
            source = TensorSource(slice=Slice(of=source, dim=dim, begin=index, end=end, step=step))
    order = list(range(len(dims)))
    for seen, dim in enumerate(dims):
        other = order.index(dim)
        if other != seen:
            source = TensorSource(transposed=Transposed(of=source, dim0=seen, dim1=other))
            order[seen], order[other] = order[other], order[seen]
    return source


def _dims_of(piece: Piece) -> list[int]:
    """The dimension of the checkpoint's tensor that each dimension of the piece runs along."""
    left = list(range(len(piece.tensor_shape)))
    found: dict[int, int] = {}
    indices, strides = _indices(piece.offset, piece.tensor_shape), _row_major(piece.tensor_shape)
    for seen, (count, stride) in enumerate(zip(piece.shape, piece.strides, strict=True)):
        if count == 1:
            continue
        for dim in left:
            step, rest = divmod(stride, strides[dim])
            if step and not rest and indices[dim] + (count - 1) * step < piece.tensor_shape[dim]:
                found[seen] = dim
                left.remove(dim)
                break
        else:
            raise UntraceableError(f"{piece.tensor} is seen as {list(piece.shape)}, across its dimensions")
    if len(piece.shape) != len(piece.tensor_shape):
        raise UntraceableError(f"{piece.tensor} has other dimensions than {list(piece.shape)}")
    return [found[seen] if seen in found else left.pop(0) for seen in range(len(piece.shape))]


def matrix(place: Place) -> MatrixSource:
    """The rows of a part of an FFN: `place` has [neurons, hidden_size]."""
    if not isinstance(place, Piece):
        raise UntraceableError(f"a matrix of {list(place.shape)} lies in several tensors: {tensors_of(place)[:3]}")
    *_, rows, columns = place.tensor_shape if len(place.tensor_shape) in (2, 3) else (0, 0)
    (neurons, hidden), (step, along) = place.shape, place.strides
    number, offset = divmod(place.offset, max(1, rows * columns))
    row, column = divmod(offset, max(1, columns))
    by_rows = along == 1 and hidden == columns and step % columns == 0
    by_columns = along == columns and hidden == rows and row == 0
    if by_rows and row + (neurons - 1) * (step // columns) < rows:
        return MatrixSource(tensor=place.tensor, matrix=number, first=row, step=step // columns)
    if by_columns and column + (neurons - 1) * step < columns:
        return MatrixSource(tensor=place.tensor, matrix=number, columns=True, first=column, step=step)
    raise UntraceableError(
        f"the rows of {place.tensor} {list(place.tensor_shape)} are not a part of an FFN {list(place.shape)}"
    )


def tensors_of(place: Place) -> list[str]:
    """The tensors of the checkpoint, each once, in the order of their first use."""
    if isinstance(place, Piece):
        return [place.tensor]
    return list(dict.fromkeys(name for part in place.parts for name in tensors_of(part)))


def gather(source: TensorSource, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The elements of a source, from the tensors of the checkpoint."""
    gathered: torch.Tensor = tensor_sources.gather(source, tensors, torch.stack, torch.cat)
    return gathered


# Shapes


def _row_major(shape: Shape) -> Shape:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _with(shape: Shape, dim: int, value: int) -> Shape:
    return (*shape[:dim], value, *shape[dim + 1 :])


def _without(shape: Shape, dim: int) -> Shape:
    return (*shape[:dim], *shape[dim + 1 :])


def _equal_at_start(one: Shape, other: Shape) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _indices(offset: int, shape: Shape) -> list[int]:
    indices = []
    for stride in _row_major(shape):
        index, offset = divmod(offset, stride)
        indices.append(index)
    return indices


def _continues(one: Piece, other: Piece, dim: int) -> bool:
    return (
        (one.tensor, one.strides) == (other.tensor, other.strides)
        and _without(one.shape, dim) == _without(other.shape, dim)
        and other.offset == one.offset + one.shape[dim] * one.strides[dim]
    )


def _strides_as(shape: Shape, strides: Shape, new: Shape) -> Shape | None:
    """The strides of a view of shape `new`, or None if there is none: runs of dimensions that are adjacent in memory
    are divided anew."""
    if prod(shape) != prod(new):
        raise UntraceableError(f"{list(shape)} has not as many elements as {list(new)}")
    runs: list[tuple[int, int]] = []  # elements and stride of each run
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    found: list[int] = []
    left = iter(runs)
    count, stride = 1, 0
    for size in new:
        if size == 1:
            found.append(0)
            continue
        if count == 1:
            count, stride = next(left)
        if count % size:
            return None
        count //= size
        found.append(stride * count)
    return tuple(found)
