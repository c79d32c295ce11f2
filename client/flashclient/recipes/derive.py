"""Derives how a checkpoint is imported, from transformers' own model of it: the entry of this package.

1. published.py says which class of transformers runs the checkpoint.
2. A tiny instance of the class is run, and its FFNs are found by numbers: ffns/tiny.py, watching.py, mixtures.py.
3. They are carried over to the full-size model, which has no weights: ffns/sites.py.
4. The tiny instance is imported and streamed, and compared with transformers: proof.py.
5. Every tensor of the full-size model is found in the checkpoint: flashclient.tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from flashclient.errors import ModelError
from flashclient.recipes.assembly import assemble
from flashclient.recipes.configs import read_config
from flashclient.recipes.ffns.site import Site
from flashclient.recipes.ffns.sites import Streamed, carried, layers_needed, streamed, weightless
from flashclient.recipes.ffns.tiny import model_class, one_line, tiny_model
from flashclient.recipes.ffns.watching import unrecognised_because, watch
from flashclient.recipes.gguf_names import gguf_places
from flashclient.recipes.lookups import embeddings_like, looked_up
from flashclient.recipes.proof import prove
from flashclient.recipes.published import Published, published
from flashclient.tensors.names import Found, find_tensors, own_tensors, places_of
from weightd_proto.weightd_pb2 import Activation, DeriveRequest, LeftOut, Recipe

SIZE_MAX = 1 << 31  # the largest number of a configuration: far above any model, and products of two fit 64 bits
LAYERS_MAX = 4096  # the deepest published models have about 130
POSITIVE = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
SIZE = re.compile(r"(size|dim|layers|heads?|experts|^n_\w+|length|embeddings)$")


def derive(request: DeriveRequest) -> Recipe:
    """Derives the recipe of a checkpoint.

    Raises:
        ModelError: no class of transformers runs the checkpoint, nothing of it can be streamed, the proof fails, or a
            tensor is missing or would be lost. One line, which names the module or tensor.
    """
    kind = published(_values(request.config_json), request.activation or None)
    whole = read_config(kind.config)
    found, made_from = model_class(whole)
    derivation = Derivation(found, made_from, _instead(kind.activation))
    split = derivation.streamed()
    derivation.prove()
    try:
        tensors, left_out = _tensors(request, kind, derivation.full)
    except ModelError as error:
        raise ModelError(f"{error}{_saved_from(kind.config, made_from, found)}") from error
    recipe = assemble(derivation.full, split.sites, tensors, embeddings_like(derivation.looked_up, derivation.full))
    values = kind.config if made_from is whole else made_from.to_dict()
    recipe.config_json = json.dumps(values).encode()
    recipe.left_out.extend(left_out)
    recipe.notes.extend([*kind.notes, *split.notes()])
    return recipe


def _tensors(request: DeriveRequest, kind: Published, full: PreTrainedModel) -> tuple[Found, list[LeftOut]]:
    if request.config_only:
        return own_tensors(full), []
    shapes = {tensor.name: tuple(tensor.shape) for tensor in request.tensors}
    if request.gguf:
        return find_tensors(full, gguf_places(full, request.gguf, shapes)), []
    sources, left_out = kind.tensors(shapes)
    return find_tensors(full, places_of(sources, shapes)), left_out


def _saved_from(values: Mapping[str, Any], config: PreTrainedConfig, found: type[PreTrainedModel]) -> str:
    """What the checkpoint is, where it is of another kind of model than `found`: as the end of an error."""
    if config.is_encoder_decoder:
        return f"; {config.model_type} has an encoder, too, and only a checkpoint of its decoder alone runs"
    named = values.get("architectures")
    first = named[0] if isinstance(named, list) and named else found.__name__
    return "" if first == found.__name__ else f"; it was saved from {first}, and {found.__name__} is what runs"


def _instead(activation: Activation | None) -> Activation | None:
    """`activation`, marked as what the class does not compute."""
    if activation is None:
        return None
    marked = Activation(instead=True)
    marked.MergeFrom(activation)
    return marked


def _values(config_json: bytes) -> dict[str, Any]:
    try:
        values = json.loads(config_json)
    except ValueError as error:
        raise ModelError(f"config.json is no JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ModelError("config.json is no JSON object")
    _check_sizes(values)
    return values


def _check_sizes(values: Mapping[str, Any]) -> None:
    """ModelError for a number that no model has, before memory is taken for the names of its layers."""
    for name, value in values.items():
        if isinstance(value, dict):
            _check_sizes(value)
        elif type(value) is int and SIZE.search(name):
            layers = name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
            least = 1 if name in POSITIVE else 0 if layers else -1  # which often stands for no limit
            most = LAYERS_MAX if layers else SIZE_MAX
            if not least <= value <= most:
                raise ModelError(f"config.json has {name} = {value}, expected a number from {least} to {most}")


class Derivation:
    """What is streamed of the model of a class and a config.

    Args:
        activation: what the FFNs compute instead of what the class says.

    Attributes:
        full: the full-size model, without weights.
        tiny: a tiny instance. Its weights are large enough to show all of each formula.
        looked_up: its embeddings that only look rows up.

    Raises:
        ModelError: the class cannot be made from the config.
    """

    def __init__(
        self, found: type[PreTrainedModel], config: PreTrainedConfig, activation: Activation | None = None
    ) -> None:
        self.full = weightless(found, config)
        self.tiny = tiny_model(found, config, layers_needed(self.full))
        self._outline = weightless(found, self.tiny.config)
        self._found = watch(self.tiny)
        self.looked_up = looked_up(self.tiny)
        self._activation = activation

    def streamed(self) -> Streamed:
        """What is streamed of the full-size model. Raises ModelError where that is nothing."""
        return self._of_class if self._activation is None else self._of_class.computing(self._activation)

    def prove(self) -> None:
        """Raises ModelError where the tiny instance, imported and streamed, computes something else."""
        embeddings = embeddings_like(self.looked_up, self._outline)
        prove(self.tiny, self._outline, self._tiny_sites(), embeddings, self._activation)

    @cached_property
    def _of_class(self) -> Streamed:
        split = streamed(self.full, carried(self._outline, self._found.sites, self._found.called, self.full))
        if not split.sites:
            name = type(self.full).__name__
            why = unrecognised_because(self.tiny)
            raise ModelError(f"no FFN of {name} could be recognised, so nothing of it can be streamed{why}")
        return split

    def _tiny_sites(self) -> list[Site]:
        """Those whose layout and formula are streamed."""
        first = self._of_class.sites[0]
        return [
            site for site in self._found.sites if (site.activation, site.names()) == (first.activation, first.names())
        ]
