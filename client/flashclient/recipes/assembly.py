"""Puts a recipe together: layers by their sites, and the places of all tensors in the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from flashclient.recipes.ffns.site import Rows, Site
from flashclient.tensors.names import Found, kept_in_f32, part_source, tied_pairs
from flashclient.tensors.places import Place, message
from weightd_proto.tables import WEIGHT
from weightd_proto.weightd_pb2 import (
    Bias,
    BundleLayout,
    BundlePart,
    ExpertSource,
    FfnSource,
    Layer,
    MatrixSource,
    Model,
    Recipe,
    ResidentSource,
)


def assemble(model: PreTrainedModel, sites: Sequence[Site], tensors: Found, embeddings: Sequence[str] = ()) -> Recipe:
    """The recipe of `model`, without config_json.

    Args:
        sites: all of one layout and activation, at least one.
        embeddings: modules that only look up rows of their weight.

    Raises:
        ModelError: the rows of a part lie in the checkpoint in a way that an import cannot follow.
    """
    first = sites[0]
    held = _Held(model, tensors)
    layout = BundleLayout(hidden_size=first.hidden_size, parts=[BundlePart(name=name) for name in first.names()])
    record = Model(
        family=model.config.model_type,
        model_class=type(model).__name__,
        activation=first.activation,
        bundle=layout,
        layers=[layer_of(site) for site in sites],
    )
    matrices = {held.name(site.path(part.rows.parameter)) for site in sites for part in site.parts}
    kept, in_rows = kept_in_f32(model), _used_by_row(model)
    resident = [
        ResidentSource(
            name=name,
            shape=place.shape,
            source=message(place),
            tied_to=tensors.tied.get(name, ""),
            f32_in=kept.get(name, []),
            rows=name in in_rows,
        )
        for name, place in tensors.places.items()
        if name not in matrices
    ]
    ffns = [_ffn_source(site, held) for site in sites]
    left_out = tensors.left_out_messages()
    names = {source.name for source in resident}
    tables = [module for module in embeddings if f"{module}.{WEIGHT}" in names]
    return Recipe(model=record, ffns=ffns, resident=resident, left_out=left_out, tables=tables)


def _used_by_row(model: PreTrainedModel) -> set[str]:
    """The matrices that belong to nothing but linear layers, which native kernels compute, and embeddings."""
    tied = tied_pairs(model)
    found: set[str] = set()
    others: set[str] = set()
    for path, module in model.named_modules():
        by_row = type(module) is nn.Linear or isinstance(module, nn.Embedding)
        for name, _ in module.named_parameters(path, recurse=False, remove_duplicate=False):
            (found if by_row and name.endswith(f".{WEIGHT}") else others).update((name, tied.get(name, name)))
    return found - others


def layer_of(site: Site) -> Layer:
    """The layer of the record, without cells and offset."""
    *first, down = site.parts
    biases = []
    for part in first:
        if part.bias is not None:
            begin, step = part.bias.first_and_step(site.neurons)
            tensor = site.path(part.bias.parameter)
            biases.append(Bias(part=part.name, tensor=tensor, first=begin, step=step))
    return Layer(
        module=site.module,
        neurons=site.neurons * max(1, site.experts),
        place=site.place,
        experts=site.experts,
        weights=[part.rows.parameter for part in site.parts],
        biases=biases,
        output_bias=site.path(down.bias.parameter) if down.bias is not None else "",
    )


class _Held:
    """The places of all parameters: one that is tied to another has the other's."""

    def __init__(self, model: PreTrainedModel, tensors: Found) -> None:
        self._places = tensors.places
        self._tied = tied_pairs(model)

    def name(self, parameter: str) -> str:
        return parameter if parameter in self._places else self._tied.get(parameter, parameter)

    def place(self, parameter: str) -> Place:
        return self._places[self.name(parameter)]


def _ffn_source(site: Site, held: _Held) -> FfnSource:
    experts = range(site.experts) if site.experts else [None]
    return FfnSource(experts=[ExpertSource(parts=_parts(site, expert, held)) for expert in experts])


def _parts(site: Site, expert: int | None, held: _Held) -> list[MatrixSource]:
    return [
        part_source(
            held.place(site.path(part.rows.parameter)),
            _index(part.rows, site.neurons, expert),
            int(part.rows.columns),
        )
        for part in site.parts
    ]


def _index(rows: Rows, neurons: int, expert: int | None) -> tuple[int | slice, ...]:
    begin, step = rows.first_and_step(neurons)
    taken = slice(begin, begin + step * (neurons - 1) + 1, step)
    matrix = (slice(None), taken) if rows.columns else (taken, slice(None))
    return matrix if expert is None else (expert, *matrix)
