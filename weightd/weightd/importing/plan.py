"""The order in which an import reads. Reading, cutting and writing overlap, and need little memory.

Bundles are cut unit by unit (units.py). Where a unit's neurons are columns of a matrix, that matrix must be in memory.
So there is memory for the matrices of two units: bundles are cut with those of one, while those of the next are being
read. Everything else passes through buffers of CHUNK_BYTES.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm

from weightd.disk.read_ahead import CHUNK_BYTES, Extent
from weightd.disk.tensors import SourceTensor
from weightd.importing.units import TensorMatrix, Unit, UnitPart
from weightd_proto import weightd_pb2
from weightd_proto.encodings import DTYPES, bundle_neurons

# Dequantising makes up to a dozen temporary arrays of the result's size.
DEQUANTISED_CHUNK_BYTES = 2 << 20


@dataclass(frozen=True)
class ElementRun:
    """Elements [begin, end) of a tensor. They are whole rows where rows must be read whole (see dequantise())."""

    tensor: SourceTensor
    begin: int
    end: int

    @property
    def first_row(self) -> int:
        return self.begin // self.tensor.row_elements

    @property
    def end_row(self) -> int:
        return -(-self.end // self.tensor.row_elements)

    @property
    def extents(self) -> tuple[Extent, ...]:
        """Of the values, and of the scales and zeros if they lie elsewhere."""
        values = _extent(self.tensor, self.begin, self.end)
        scales = self.tensor.scales
        if scales is None or self.begin == self.end:
            return (values,)
        first, end = scales.rows_of(self.first_row, self.end_row)
        beside = [_rows_extent(scales.tensor, first, end)]
        return (values, *beside, *([] if scales.zeros is None else [_rows_extent(scales.zeros, first, end)]))


def _rows_extent(tensor: SourceTensor, first: int, end: int) -> Extent:
    """Of rows, and of those whose numbers share a word with them."""
    together, width = tensor.rows_together, tensor.row_elements
    return _extent(tensor, first // together * together * width, -(-end // together) * together * width)


def _extent(tensor: SourceTensor, begin: int, end: int) -> Extent:
    first_byte, end_byte = tensor.bytes_of(begin), tensor.bytes_of(end)
    return Extent(tensor.path, tensor.offset_bytes + first_byte, end_byte - first_byte)


@dataclass(frozen=True)
class HoldStep:
    """Reads elements of a unit's matrix, from its element `first` on, into memory. `held`: its index in Unit.held."""

    unit: int
    held: int
    first: int
    runs: tuple[ElementRun]


@dataclass(frozen=True)
class CutPart:
    """Where a part of a step's first bundle lies: in a column of a held matrix, or a row of one of the step's runs."""

    columns: bool
    index: int  # of the held matrix or of the run
    first: int
    step: int


@dataclass(frozen=True)
class BundleStep:
    """Cuts and writes the bundles of neurons [begin, end) of a unit."""

    unit: int
    begin: int
    end: int
    parts: tuple[CutPart, ...]
    runs: tuple[ElementRun, ...]


def plan_bundles(units: Sequence[Unit], layout: weightd_pb2.BundleLayout) -> Iterator[HoldStep | BundleStep]:
    """The steps of all units. A unit's matrices are read between the bundles of the unit before."""
    upcoming = list(_hold_steps(0, units[0]))
    yield from upcoming
    for index, unit in enumerate(units):
        cuts = list(_bundle_steps(index, unit, layout))
        upcoming = list(_hold_steps(index + 1, units[index + 1])) if index + 1 < len(units) else []
        sent = 0
        for number, step in enumerate(cuts, start=1):
            yield step
            due = len(upcoming) * number // len(cuts)
            yield from upcoming[sent:due]
            sent = due


def runs_of(tensor: SourceTensor, begin: int = 0, end: int | None = None) -> Iterator[ElementRun]:
    """Runs of at most a chunk, from one element of a tensor to another."""
    end = tensor.elements if end is None else end
    together = tensor.rows_together * tensor.row_elements
    size = max(1, _rows_per_chunk(tensor) // tensor.rows_together) * max(1, together)  # a tensor may have no elements
    for first in range(begin, end, size):
        yield ElementRun(tensor, first, min(end, first + size))


def _rows_per_chunk(tensor: SourceTensor) -> int:
    if not tensor.is_plain:
        return max(1, DEQUANTISED_CHUNK_BYTES // max(1, tensor.row_elements * DTYPES["F32"].bytes))
    return max(1, CHUNK_BYTES // max(1, tensor.bytes_of(tensor.row_elements)))


def _hold_steps(index: int, unit: Unit) -> Iterator[HoldStep]:
    for number, matrix in enumerate(unit.held):
        width = matrix.tensor.row_elements
        begin, end = matrix.first_row * width, (matrix.first_row + matrix.rows) * width
        for run in runs_of(matrix.tensor, begin, end):
            yield HoldStep(index, number, run.begin - begin, (run,))


def _bundle_steps(index: int, unit: Unit, layout: weightd_pb2.BundleLayout) -> Iterator[BundleStep]:
    """Each step has as many whole cells as fit into a chunk, both read and written; all but the last, whole blocks."""
    rows = [part for part in unit.parts if not part.columns]
    limits = [_rows_per_chunk(part.matrix.tensor) // part.step for part in rows]
    of_cell = layout.bundles_per_cell * bundle_neurons(layout)
    neurons = min([CHUNK_BYTES // layout.cell_bytes * of_cell, *limits])  # no limits where all matrices are held
    together = lcm(layout.cell_bytes, layout.block_bytes) // layout.cell_bytes * of_cell
    together = lcm(together, *(part.matrix.tensor.rows_together for part in rows))
    neurons = max(1, neurons // together) * together
    for begin in range(0, unit.neurons, neurons):
        end = min(unit.neurons, begin + neurons)
        yield BundleStep(index, begin, end, *_cut_parts(unit, begin, end))


def _cut_parts(unit: Unit, begin: int, end: int) -> tuple[tuple[CutPart, ...], tuple[ElementRun, ...]]:
    """Where the parts of neurons [begin, end) lie, and what must be read. Interleaved parts are read together."""
    held = unit.held
    spans: dict[tuple[TensorMatrix, int, int], list[int]] = {}  # rows by matrix, step, and turn of the step
    for part in unit.parts:
        if not part.columns:
            first, last = part.first + begin * part.step, part.first + (end - 1) * part.step
            span = spans.setdefault(_together(part), [first, last])
            span[:] = min(span[0], first), max(span[1], last)
    order = list(spans)
    parts = []
    for part in unit.parts:
        first = part.first + begin * part.step
        if part.columns:
            parts.append(CutPart(True, held.index(part.matrix), first, part.step))
        else:
            run = order.index(_together(part))
            parts.append(CutPart(False, run, first - spans[order[run]][0], part.step))
    return tuple(parts), tuple(_rows(matrix, *spans[matrix, step, turn]) for matrix, step, turn in order)


def _together(part: UnitPart) -> tuple[TensorMatrix, int, int]:
    return part.matrix, part.step, part.first // part.step


def _rows(matrix: TensorMatrix, first: int, last: int) -> ElementRun:
    width = matrix.tensor.row_elements
    return ElementRun(matrix.tensor, (matrix.first_row + first) * width, (matrix.first_row + last + 1) * width)
