"""The order in which an import reads. Reading, cutting and writing overlap, and need little memory.

A bundle has a column of the down matrix, and a column is spread over the whole matrix. So the down matrices of two
layers are in memory: bundles are cut with one, while the other, of the next layer, is being read. Everything else
passes through buffers of CHUNK_BYTES.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from weightd.disk.read_ahead import CHUNK_BYTES, Extent
from weightd.importing.dequantise import row_elements, rows, rows_together
from weightd.importing.families import FfnTensors, Recipe, TensorSource
from weightd_proto import weightd_pb2
from weightd_proto.encodings import DTYPES, is_plain

# gguf's dequantize() makes about a dozen temporary arrays of the result's size.
DEQUANTISED_CHUNK_BYTES = 2 << 20


@dataclass(frozen=True)
class Slice:
    """Rows [begin, end) of a tensor."""

    source: TensorSource
    begin: int
    end: int

    @property
    def elements(self) -> tuple[int, int]:
        size = row_elements(self.source)
        return self.begin * size, self.end * size

    @property
    def extent(self) -> Extent:
        tensor = self.source.tensor
        begin, end = (tensor.bytes_of(count) for count in self.elements)
        return Extent(tensor.path, tensor.offset_bytes + begin, end - begin)


@dataclass(frozen=True)
class DownStep:
    """Reads rows of a layer's down matrix into memory."""

    layer: int
    slices: tuple[Slice]


@dataclass(frozen=True)
class BundleStep:
    """Cuts and writes the bundles of neurons [begin, end) of a layer. There is a slice per row part."""

    layer: int
    begin: int
    end: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class ResidentStep:
    """Appends rows to the index-th resident tensor."""

    index: int
    slices: tuple[Slice]


Step = DownStep | BundleStep | ResidentStep


def plan_bundles(
    recipe: Recipe, sources: Mapping[str, TensorSource], layout: weightd_pb2.BundleLayout
) -> Iterator[DownStep | BundleStep]:
    """The steps of all layers. A layer's down matrix is read between the bundles of the layer before."""
    downs = [list(_down_steps(index, ffn, sources)) for index, ffn in enumerate(recipe.layers)]
    downs.append([])
    yield from downs[0]
    for index, ffn in enumerate(recipe.layers):
        runs = list(_bundle_steps(index, ffn, sources, layout))
        upcoming = downs[index + 1]
        sent = 0
        for number, run in enumerate(runs, start=1):
            yield run
            due = len(upcoming) * number // len(runs)
            yield from upcoming[sent:due]
            sent = due


def plan_resident(tensors: list[weightd_pb2.Tensor], sources: Mapping[str, TensorSource]) -> Iterator[ResidentStep]:
    for index, tensor in enumerate(tensors):
        for piece in _slices(sources[tensor.name]):
            yield ResidentStep(index, (piece,))


def _slices(source: TensorSource) -> Iterator[Slice]:
    count, unit = rows(source), rows_together(source)
    units = max(1, _rows_per_chunk(source) // unit)
    for begin in range(0, count, units * unit):
        yield Slice(source, begin, min(count, begin + units * unit))


def _rows_per_chunk(source: TensorSource) -> int:
    elements = row_elements(source)
    if not is_plain(source.tensor.encoding):
        return max(1, DEQUANTISED_CHUNK_BYTES // (elements * DTYPES["F32"].bytes))
    return max(1, CHUNK_BYTES // source.tensor.bytes_of(elements))


def _down_steps(index: int, ffn: FfnTensors, sources: Mapping[str, TensorSource]) -> Iterator[DownStep]:
    for piece in _slices(sources[ffn.matrices[-1]]):
        yield DownStep(index, (piece,))


def _bundle_steps(
    index: int, ffn: FfnTensors, sources: Mapping[str, TensorSource], layout: weightd_pb2.BundleLayout
) -> Iterator[BundleStep]:
    """Each step has as many whole cells as fit into a chunk, both read and written."""
    parts = [sources[name] for name in ffn.matrices[:-1]]
    neurons = min(
        CHUNK_BYTES // layout.cell_bytes * layout.bundles_per_cell, *(_rows_per_chunk(part) for part in parts)
    )
    neurons = max(1, neurons // layout.bundles_per_cell) * layout.bundles_per_cell
    for begin in range(0, ffn.neurons, neurons):
        end = min(ffn.neurons, begin + neurons)
        yield BundleStep(index, begin, end, tuple(Slice(part, begin, end) for part in parts))
