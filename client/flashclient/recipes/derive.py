"""Derives the recipe of a checkpoint from transformers' own model of its type.

The FFNs are found by running a tiny instance of the model (watching.py) and carried over to the full size (sites.py).
Every parameter is looked for in the checkpoint by transformers' own rules (names.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from flashclient.errors import ModelError
from flashclient.recipes.published import Published, published
from flashclient.recipes.reference import amend
from flashclient.recipes.site import Part, Site
from flashclient.recipes.sites import Streamed, carried, layers_needed, streamed, weightless
from flashclient.recipes.tiny import tiny_model
from flashclient.recipes.watching import watch
from flashclient.tensors.names import Found, find_tensors, kept_in_f32, part_source, places_of
from flashclient.tensors.places import Place, message
from weightd_proto.weightd_pb2 import DeriveRequest, ExpertSource, FfnSource, Layer, MatrixSource, Recipe

SIZE_MAX = 1 << 31  # the largest number of a configuration: far above any model, and products of two fit 64 bits
LAYERS_MAX = 4096  # the deepest published models have about 130
REASON_CHARACTERS_MAX = 400
SIZE = re.compile(r"(size|dim|layers?|heads?|experts|n_\w+|length|embeddings)$")


def derive(request: DeriveRequest) -> Recipe:
    """The recipe of a checkpoint.

    Raises:
        ModelError: no class of transformers runs it, a value of its configuration cannot be honoured, it does not have
            the tensors that its configuration says, or no FFN of it is known to the kernels. In one line.
    """
    found = published(json.loads(request.config_json), request.activation or None)
    _check_sizes(found.config)
    with _blamed("config.json"):
        config = CONFIG_MAPPING[found.config["model_type"]].from_dict(dict(found.config))
        model = weightless(config)
        ffns = _ffns(config, model, found)
    if not ffns.sites:
        raise ModelError(f"no FFN of {type(model).__name__} computes what the kernels compute")
    sources, left_out = found.tensors({tensor.name: tuple(tensor.shape) for tensor in request.tensors})
    shapes = {tensor.name: tuple(tensor.shape) for tensor in request.tensors}
    tensors = find_tensors(model, places_of(sources, shapes))
    recipe = Recipe(config_json=json.dumps(found.config).encode())
    recipe.left_out.extend([*left_out, *tensors.left_out_messages()])
    _describe(recipe, found.config["model_type"], model, ffns)
    for site in ffns.sites:
        recipe.model.layers.append(_layer(site))
        recipe.ffns.append(_ffn_source(site, tensors.places))
    _add_resident(recipe, model, tensors)
    return recipe


def _ffns(config: PreTrainedConfig, model: PreTrainedModel, found: Published) -> Streamed:
    tiny = tiny_model(config, layers_needed(model))
    if found.activation is not None:
        amend(tiny, found.activation)
    watched = watch(tiny)
    return streamed(model, carried(weightless(tiny.config), watched.sites, watched.called, model))


def _check_sizes(config: Mapping[str, Any]) -> None:
    """ModelError for a number that no model has, before memory is taken for the names of its layers."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value)
        elif type(value) is int and SIZE.search(name):
            least = name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
            most = LAYERS_MAX if name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") else SIZE_MAX
            if not least <= value <= most:
                raise ModelError(f"config.json has {name} = {value}, expected a number from {int(least)} to {most}")


@contextmanager
def _blamed(file: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # transformers raises anything for a configuration of unknown origin
        reason = re.sub(r"\s+", " ", str(error)).strip()[:REASON_CHARACTERS_MAX]
        raise ModelError(f"{file}: {reason or type(error).__name__}") from error


# The recipe


def _describe(recipe: Recipe, model_type: str, model: PreTrainedModel, ffns: Streamed) -> None:
    first = ffns.sites[0]
    recipe.model.family = model_type
    recipe.model.model_class = type(model).__name__
    recipe.model.activation.CopyFrom(first.activation)
    recipe.model.bundle.hidden_size = first.hidden_size
    for name in first.names():
        recipe.model.bundle.parts.add(name=name)


def _layer(site: Site) -> Layer:
    layer = Layer(
        module=site.module,
        neurons=site.neurons * max(1, site.experts),
        place=site.place,
        experts=site.experts,
        weights=[part.rows.parameter for part in site.parts],
    )
    for part in site.parts:
        if part.bias is None:
            continue
        if part.name == "down":
            layer.output_bias = _path(site, part.bias.parameter)
        else:
            first, step = part.bias.first_and_step(site.neurons)
            layer.biases.add(part=part.name, tensor=_path(site, part.bias.parameter), first=first, step=step)
    return layer


def _ffn_source(site: Site, places: Mapping[str, Place]) -> FfnSource:
    experts: list[int | None] = [None] if site.experts == 0 else list(range(site.experts))
    parts = [[_part_source(site, part, expert, places) for part in site.parts] for expert in experts]
    return FfnSource(experts=[ExpertSource(parts=of_expert) for of_expert in parts])


def _part_source(site: Site, part: Part, expert: int | None, places: Mapping[str, Place]) -> MatrixSource:
    first, step = part.rows.first_and_step(site.neurons)
    neurons, values = slice(first, first + (site.neurons - 1) * step + 1, step), slice(None)
    index = (values, neurons) if part.rows.columns else (neurons, values)
    place = places[_path(site, part.rows.parameter)]
    return part_source(place, index if expert is None else (expert, *index), 1 if part.rows.columns else 0)


def _path(site: Site, parameter: str) -> str:
    return f"{site.module}.{parameter}" if site.module else parameter


def _add_resident(recipe: Recipe, model: PreTrainedModel, tensors: Found) -> None:
    streamed = {f"{layer.module}.{weight}".lstrip(".") for layer in recipe.model.layers for weight in layer.weights}
    state, kept = model.state_dict(), kept_in_f32(model)
    for name, place in tensors.places.items():
        if name not in streamed:
            recipe.resident.add(
                name=name,
                shape=state[name].shape,
                source=message(place),
                tied_to=tensors.tied.get(name, ""),
                f32_in=kept.get(name, []),
            )
