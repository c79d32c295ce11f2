"""The units that bundles are cut from: one FFN, or one expert of a mixture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from weightd.disk.tensors import SourceTensor
from weightd.errors import CheckpointError
from weightd_proto.weightd_pb2 import MatrixSource, Recipe


@dataclass(frozen=True)
class TensorMatrix:
    """Rows [first_row, first_row + rows) of a tensor: all of it, or one index of the first of three dimensions."""

    tensor: SourceTensor = field(hash=False)
    first_row: int
    rows: int


@dataclass(frozen=True)
class UnitPart:
    """One part of a unit's bundles. That of neuron j is row or column first + step * j of the matrix."""

    matrix: TensorMatrix
    columns: bool
    first: int
    step: int


@dataclass(frozen=True)
class Unit:
    """The neurons of a layer from `position` on."""

    layer: int
    position: int
    neurons: int
    parts: tuple[UnitPart, ...]

    @property
    def held(self) -> list[TensorMatrix]:
        """The matrices whose columns are cut. A column is spread over the whole matrix, so it must be in memory."""
        return list(dict.fromkeys(part.matrix for part in self.parts if part.columns))


def units_of(recipe: Recipe, tensors: Mapping[str, SourceTensor]) -> list[Unit]:
    """The units of all layers. CheckpointError if a part of one does not lie in its tensor."""
    return [unit for layer in range(len(recipe.ffns)) for unit in _units_of_layer(recipe, layer, tensors)]


def _units_of_layer(recipe: Recipe, layer: int, tensors: Mapping[str, SourceTensor]) -> Iterator[Unit]:
    experts = recipe.ffns[layer].experts
    neurons = recipe.model.layers[layer].neurons // len(experts)
    for number, expert in enumerate(experts):
        hidden = recipe.model.bundle.hidden_size
        parts = tuple(_part(source, tensors, neurons, hidden) for source in expert.parts)
        yield Unit(layer, number * neurons, neurons, parts)


def _part(source: MatrixSource, tensors: Mapping[str, SourceTensor], neurons: int, hidden_size: int) -> UnitPart:
    tensor = tensors[source.tensor]
    *matrices, rows, width = tensor.shape if len(tensor.shape) in (2, 3) else (0, 0)
    count, values = (width, rows) if source.columns else (rows, width)
    last = source.first + source.step * (neurons - 1)
    if values != hidden_size or source.step == 0 or last >= count or source.matrix >= (matrices or [1])[0]:
        raise CheckpointError(
            f"{source.tensor} has shape {list(tensor.shape)} in {tensor.path}, which does not hold {neurons} neurons "
            f"of {hidden_size} values"
        )
    return UnitPart(TensorMatrix(tensor, source.matrix * rows, rows), source.columns, source.first, source.step)
