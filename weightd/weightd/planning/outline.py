"""What a record says of a model, for people: its FFNs and its resident tensors, those of all layers together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from weightd.sizes import format_size
from weightd_proto.tables import with_tables
from weightd_proto.weightd_pb2 import Activation, Layer, LeftOut, Model

LISTED_MAX = 6
_NOT_LISTED = ("function", "parameter", "instead", "further", "learned")  # of an activation: they stand elsewhere
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Ffns:
    """FFNs of one kind.

    Attributes:
        module: the path of all, with * for the number of the layer.
        place: see Layer in weightd.proto.
        neurons: of one, or of one expert.
        parts: the parameter of each part of a bundle, below the module.
    """

    module: str
    count: int
    place: str
    neurons: int
    experts: int
    parts: Mapping[str, str]

    def line(self) -> str:
        what = f"{self.experts} experts of {self.neurons} neurons" if self.experts else f"{self.neurons} neurons"
        parts = ", ".join(f"{part} {parameter}" for part, parameter in self.parts.items())
        return f"{self.count} x {what}, {_PLACES[self.place]} {self.module} ({parts})"


_PLACES = {"MODULE": "each the module", "PARTS": "each a part of", "EXPERTS": "each the experts"}


@dataclass(frozen=True)
class Tensors:
    """Tensors whose names differ in numbers of layers only."""

    name: str
    count: int
    size_bytes: int


def ffns_of(record: Model) -> list[Ffns]:
    """In the order of their first layers."""
    parts = [part.name for part in record.bundle.parts]
    counts: dict[tuple[str, int, int, int, tuple[str, ...]], int] = defaultdict(int)
    for layer in record.layers:
        neurons = layer.neurons // max(1, layer.experts)
        counts[generic(layer.module), layer.place, neurons, layer.experts, tuple(layer.weights)] += 1
    return [
        Ffns(module, count, Layer.Place.Name(place), neurons, experts, dict(zip(parts, weights, strict=True)))
        for (module, place, neurons, experts, weights), count in counts.items()
    ]


def resident_of(record: Model) -> list[Tensors]:
    """Largest first."""
    counts: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for tensor in record.resident:
        counts[generic(tensor.name)] += 1
        sizes[generic(tensor.name)] += tensor.size_bytes
    return [Tensors(name, counts[name], sizes[name]) for name in sorted(sizes, key=lambda name: -sizes[name])]


def tables_of(record: Model) -> list[Tensors]:
    """Tables on flash, whose rows are looked up."""
    return [Tensors(table.layers[0].module, 1, table.bundles_file_bytes) for table in record.tables]


def stored_bytes(record: Model) -> int:
    """What the model takes in a store: FFNs, tables and resident tensors."""
    return record.resident_file_bytes + sum(one.bundles_file_bytes for one in with_tables(record))


def tensors_line(tensors: Sequence[Tensors]) -> str:
    """The first ones, and what the others take."""
    listed = [f"{each.name} {format_size(each.size_bytes)}" for each in tensors[:LISTED_MAX]]
    others = sum(each.size_bytes for each in tensors[LISTED_MAX:])
    return ", ".join([*listed, *([f"others {format_size(others)}"] if others else [])])


def left_out_of(left_out: Sequence[LeftOut]) -> Iterator[tuple[str, dict[str, int]]]:
    """Each reason, and how many tensors it is for by the module that they belong to: vision_tower, for example."""
    for each in left_out:
        counts: dict[str, int] = defaultdict(int)
        for name in each.tensors:
            counts[_outermost(name)] += 1
        yield each.reason, dict(counts)


def activation_text(activation: Activation) -> str:
    """The formula of what a neuron computes, as in weightd.proto, without what it does not use."""
    function = activation.function
    if activation.parameter:
        function += f":{activation.parameter:g}"
    fields = [f"{field.name} {value:g}" for field, value in activation.ListFields() if field.name not in _NOT_LISTED]
    return ", ".join([function, *fields])


def generic(name: str) -> str:
    """A path with * for each number."""
    return _NUMBER.sub(".*", name)


def _outermost(name: str) -> str:
    """The first name of a path that says something."""
    names = name.split(".")
    return names[1] if names[0] == "model" and len(names) > 2 else names[0]
