"""Resident tensors, put together from the checkpoint's tensors.

Most are a tensor of the checkpoint, rows of one, or several tensors after each other. These are read in pieces. Others,
for example transposed ones, are put together in memory, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from weightd.disk.tensors import SourceTensor
from weightd.errors import CheckpointError
from weightd.importing.plan import ElementRun, runs_of
from weightd_proto.tensor_sources import tensor_names
from weightd_proto.weightd_pb2 import Concatenated, ResidentSource, Slice, TensorSource

# Ranges that are shorter on average are not read one by one: a device reads them no faster than this many bytes.
RANGE_BYTES_MIN = 64 << 10

Shape = tuple[int, ...]
Tensors = Mapping[str, SourceTensor]


@dataclass(frozen=True)
class ResidentStep:
    """Appends elements to the index-th resident tensor. `kept`: as they are stored, in blocks."""

    index: int
    runs: tuple[ElementRun]
    kept: bool = False


@dataclass(frozen=True)
class AssemblyStep:
    """Reads elements of tensor `name`, a part of the index-th resident tensor. The `last` step completes that.

    `kept`: in blocks, which lie in columns of a tensor that is to be transposed."""

    index: int
    name: str
    runs: tuple[ElementRun]
    last: bool
    kept: bool = False


def kept_format(resident: ResidentSource, tensors: Tensors) -> str | None:
    """The format of blocks in which the rows of a tensor can be kept, as the checkpoint holds all of them one after the
    other, or transposed in a tensor whose blocks lie in columns; None: they cannot be kept."""
    used = [tensors[name] for name in tensor_names(resident.source)]
    formats = {tensor.kept_format for tensor in used}
    if len(formats) != 1 or "" in formats:
        return None
    (format,) = formats
    if any(tensor.in_columns for tensor in used):
        of = resident.source.transposed.of
        whole = resident.source.WhichOneof("of") == "transposed" and of.WhichOneof("of") == "tensor"
        return format if whole and used[0].rows == resident.shape[-1] else None
    ranges = _read_in_order(resident.source, tensors)
    row_elements = {tensor.row_elements for tensor in used}
    values_change = any(tensor.undo is not None and not tensor.undo.heads for tensor in used)
    in_rows = ranges is not None and row_elements == {resident.shape[-1]} and not values_change
    return format if in_rows else None


def plan_resident(
    sources: Sequence[ResidentSource], tensors: Tensors, kinds: Mapping[str, tuple[str, Shape]]
) -> Iterator[ResidentStep | AssemblyStep]:
    """The steps for all resident tensors, in the order of `sources`. `kinds`: in which dtype or format they are stored.
    What is stored in its kept_format() is copied."""
    for index, resident in enumerate(sources):
        _check_shape(resident, tensors)
        kept = resident.name in kinds and kept_format(resident, tensors) == kinds[resident.name][0]
        ranges = _read_in_order(resident.source, tensors)
        if ranges is not None:
            for item in ranges:
                runs = runs_of(tensors[item.name], item.begin, item.end)
                yield from (ResidentStep(index, (run,), kept) for run in runs)
            continue
        pieces = [(name, run) for name in tensor_names(resident.source) for run in runs_of(tensors[name])]
        for number, (name, run) in enumerate(pieces, start=1):
            yield AssemblyStep(index, name, (run,), number == len(pieces), kept)


def _check_shape(resident: ResidentSource, tensors: Tensors) -> None:
    shape = _shape(resident.source, tensors)
    if prod(shape) != prod(resident.shape):
        (first, *_) = tensor_names(resident.source)
        raise CheckpointError(
            f"{resident.name} has shape {list(shape)} in {tensors[first].path}, but the configuration says "
            f"{list(resident.shape)}"
        )


def _shape(source: TensorSource, tensors: Tensors) -> Shape:
    match source.WhichOneof("of"):
        case "concatenated":
            dim, shapes = source.concatenated.dim, [_shape(part, tensors) for part in source.concatenated.parts]
            first = shapes[0]
            if source.concatenated.stacked:
                return (*first[:dim], len(shapes), *first[dim:])
            return (*first[:dim], sum(shape[dim] for shape in shapes), *first[dim + 1 :])
        case "slice":
            cut, shape = source.slice, _shape(source.slice.of, tensors)
            return (*shape[: cut.dim], len(range(cut.begin, cut.end, cut.step)), *shape[cut.dim + 1 :])
        case "transposed":
            shape, dims = _shape(source.transposed.of, tensors), (source.transposed.dim0, source.transposed.dim1)
            swapped = {dims[0]: shape[dims[1]], dims[1]: shape[dims[0]]}
            return tuple(swapped.get(dim, size) for dim, size in enumerate(shape))
    return tensors[source.tensor].shape


# Sources as ranges that are read one after the other


@dataclass(frozen=True)
class _Range:
    """Elements [begin, end) of a tensor."""

    name: str
    begin: int
    end: int


class _TooFineError(Exception):
    """The elements do not lie in long ranges."""


def _read_in_order(source: TensorSource, tensors: Tensors) -> list[_Range] | None:
    """The ranges that hold the elements in order; None if they are too short, or cut through what is read whole."""
    elements = prod(_shape(source, tensors))
    element_bytes = 2
    most = max(1, elements * element_bytes // RANGE_BYTES_MIN)
    try:
        ranges = _ranges(source, tensors, most)
    except _TooFineError:
        return None
    return ranges if all(_is_readable(item, tensors[item.name]) for item in ranges) else None


def _is_readable(item: _Range, tensor: SourceTensor) -> bool:
    if tensor.undo is not None and tensor.undo.heads:
        return (item.begin, item.end) == (0, tensor.elements)
    together = tensor.row_elements * tensor.rows_together
    return tensor.is_plain or item.begin % together == item.end % together == 0


def _ranges(source: TensorSource, tensors: Tensors, most: int) -> list[_Range]:
    match source.WhichOneof("of"):
        case "concatenated":
            return _interleaved(source.concatenated, tensors, most)
        case "slice":
            return _cut(source.slice, tensors, most)
        case "transposed":
            raise _TooFineError
    return [_Range(source.tensor, 0, tensors[source.tensor].elements)]


def _interleaved(joined: Concatenated, tensors: Tensors, most: int) -> list[_Range]:
    """As many times as the dimensions before the joined one say, a block of each part."""
    parts = []
    times = prod(_shape(joined.parts[0], tensors)[: joined.dim])
    if times > 1 and times * len(joined.parts) > most:
        raise _TooFineError
    for part in joined.parts:
        block = prod(_shape(part, tensors)) // max(1, times)
        parts.append(_blocks(_ranges(part, tensors, most), block))
    return [item for _ in range(times) for part in parts for item in next(part)]


def _cut(cut: Slice, tensors: Tensors, most: int) -> list[_Range]:
    shape = _shape(cut.of, tensors)
    times, inner = prod(shape[: cut.dim]), prod(shape[cut.dim + 1 :])
    wanted = [(cut.begin, cut.end)] if cut.step == 1 else [(i, i + 1) for i in range(cut.begin, cut.end, cut.step)]
    if times * len(wanted) > most:
        raise _TooFineError
    blocks = _blocks(_ranges(cut.of, tensors, most), shape[cut.dim] * inner)
    return [
        item
        for _ in range(times)
        for block in [next(blocks)]
        for begin, end in wanted
        for item in _part(block, begin * inner, end * inner)
    ]


def _blocks(ranges: list[_Range], size: int) -> Iterator[list[_Range]]:
    """The ranges, divided into lists of `size` elements."""
    block: list[_Range] = []
    left = size
    for item in ranges:
        begin = item.begin
        while begin < item.end:
            end = min(item.end, begin + left)
            block.append(_Range(item.name, begin, end))
            left -= end - begin
            begin = end
            if left == 0:
                yield block
                block, left = [], size


def _part(ranges: list[_Range], begin: int, end: int) -> list[_Range]:
    """Elements [begin, end) of those in `ranges`."""
    found, offset = [], 0
    for item in ranges:
        first, last = max(begin - offset, 0), min(end - offset, item.end - item.begin)
        if first < last:
            found.append(_Range(item.name, item.begin + first, item.begin + last))
        offset += item.end - item.begin
    return found
