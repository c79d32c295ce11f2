"""Model families: which tensors a model has, and how bundles are cut from them.

A recipe follows from config.json alone. Its names and shapes are those of transformers' state_dict (v5), and sources.py
finds these tensors in a checkpoint. A new family also needs its modules in flashclient/model/architectures.py.

Known irregularities: OPT checkpoints name the decoder `decoder.` or `model.decoder.`. opt-350m normalises after the
block, has no final norm, and its embedding has word_embed_proj_dim columns. Gemma ties its head. A tied head is stored
once, as the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from weightd.checkpoint.checkpoint import Checkpoint
from weightd.errors import CheckpointError
from weightd_proto import weightd_pb2

Config = Mapping[str, Any]
Shape = tuple[int, ...]

HEAD = "lm_head.weight"
GATED_PARTS = ("gate", "up", "down")
PLAIN_PARTS = ("up", "down")
SIZE_MAX = 1 << 31  # the largest dimension: far above that of any model, and products of two fit into 64 bits
LAYERS_MAX = 4096  # the deepest published models have about 130


@dataclass(frozen=True)
class FfnTensors:
    """The FFN of a layer. `matrices` are tensor names in the order of the recipe's parts; the down matrix is last."""

    module: str
    neurons: int
    matrices: tuple[str, ...]


@dataclass(frozen=True)
class FamilyRecipe:
    """The tensors of a model. Row parts are [neurons, hidden_size], the down matrix is [hidden_size, neurons].

    `tied_to` is the embedding if the configuration ties the head to it. `resident` has no head then.
    """

    family: str
    hidden_size: int
    parts: tuple[str, ...]
    layers: tuple[FfnTensors, ...]
    resident: Mapping[str, Shape]
    tied_to: str | None = None

    def shapes(self) -> dict[str, Shape]:
        """The shapes of all tensors: resident ones and FFN matrices."""
        shapes = dict(self.resident)
        for layer in self.layers:
            *rows, down = layer.matrices
            shapes.update(dict.fromkeys(rows, (layer.neurons, self.hidden_size)))
            shapes[down] = (self.hidden_size, layer.neurons)
        return shapes


def recipe_of(config: Config) -> FamilyRecipe:
    """The recipe for a transformers configuration. CheckpointError for an unknown architecture."""
    model_type = config.get("model_type")
    make = _RECIPES.get(str(model_type))
    if make is None:
        raise CheckpointError(f"unknown architecture {model_type!r}: known are {', '.join(sorted(_RECIPES))}")
    return make(config)


class _Sizes:
    """The numbers of a configuration. config.json leaves out what equals transformers' default."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.hidden = self.number("hidden_size")
        self.layers = self.number("num_hidden_layers")
        if self.layers > LAYERS_MAX:  # before memory is taken for their names
            raise CheckpointError(f"config.json has num_hidden_layers = {self.layers}, at most {LAYERS_MAX} are known")
        self.vocabulary = self.number("vocab_size")

    def number(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= SIZE_MAX:
            raise CheckpointError(f"config.json has {key} = {value!r}, expected a positive number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """The key's value, or `default` if it is missing. Null is refused, as by transformers."""
        value = self.config.get(key, default)
        if type(value) is not bool:
            raise CheckpointError(f"config.json has {key} = {value!r}, expected true or false")
        return value


def _norm(name: str, size: int) -> dict[str, Shape]:
    return {f"{name}.weight": (size,)}


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _attention(prefix: str, sizes: _Sizes, head_size: int, biases: tuple[bool, bool]) -> dict[str, Shape]:
    """Grouped-query attention. `biases`: whether q, k and v have one, and whether o has one."""
    heads = sizes.number("num_attention_heads")
    queries = heads * head_size
    keys = sizes.number("num_key_value_heads", heads) * head_size
    return {
        **_linear(f"{prefix}.q_proj", queries, sizes.hidden, biases[0]),
        **_linear(f"{prefix}.k_proj", keys, sizes.hidden, biases[0]),
        **_linear(f"{prefix}.v_proj", keys, sizes.hidden, biases[0]),
        **_linear(f"{prefix}.o_proj", sizes.hidden, queries, biases[1]),
    }


def _gated_layers(sizes: _Sizes) -> tuple[FfnTensors, ...]:
    neurons = sizes.number("intermediate_size")
    modules = [f"model.layers.{index}.mlp" for index in range(sizes.layers)]
    return tuple(FfnTensors(m, neurons, tuple(f"{m}.{part}_proj.weight" for part in GATED_PARTS)) for m in modules)


def _gated(family: str, sizes: _Sizes, layer: Callable[[str], dict[str, Shape]], tied: bool) -> FamilyRecipe:
    """Gated FFNs between embedding, layers, norm and head, as Llama and Gemma name them."""
    resident: dict[str, Shape] = {"model.embed_tokens.weight": (sizes.vocabulary, sizes.hidden)}
    for index in range(sizes.layers):
        resident |= layer(f"model.layers.{index}")
    resident |= _norm("model.norm", sizes.hidden)
    if not tied:
        resident[HEAD] = (sizes.vocabulary, sizes.hidden)
    tied_to = "model.embed_tokens.weight" if tied else None
    return FamilyRecipe(family, sizes.hidden, GATED_PARTS, _gated_layers(sizes), resident, tied_to)


def _llama(config: Config) -> FamilyRecipe:
    """Llama, Mistral (no biases) and Qwen2 (biases on q, k and v, whatever its configuration says)."""
    sizes = _Sizes(config)
    head_size = sizes.number("head_dim", sizes.hidden // sizes.number("num_attention_heads"))
    attention_bias = sizes.flag("attention_bias", False) and config["model_type"] == "llama"
    biases = (True, False) if config["model_type"] == "qwen2" else (attention_bias, attention_bias)
    if config["model_type"] == "llama" and sizes.flag("mlp_bias", False):
        raise CheckpointError("config.json has mlp_bias = true: gated FFNs with biases cannot be streamed")

    def layer(prefix: str) -> dict[str, Shape]:
        shapes = _attention(f"{prefix}.self_attn", sizes, head_size, biases)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= _norm(f"{prefix}.{norm}", sizes.hidden)
        return shapes

    return _gated("llama", sizes, layer, sizes.flag("tie_word_embeddings", False))


def _gemma3(config: Config) -> FamilyRecipe:
    sizes = _Sizes(config)
    head_size = sizes.number("head_dim", 256)
    bias = sizes.flag("attention_bias", False)

    def layer(prefix: str) -> dict[str, Shape]:
        shapes = _attention(f"{prefix}.self_attn", sizes, head_size, (bias, bias))
        for norm in ("q_norm", "k_norm"):
            shapes |= _norm(f"{prefix}.self_attn.{norm}", head_size)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes |= _norm(f"{prefix}.{norm}_layernorm", sizes.hidden)
        return shapes

    return _gated("gemma3", sizes, layer, sizes.flag("tie_word_embeddings", True))


def _opt(config: Config) -> FamilyRecipe:
    """OPT's FFN has no module of its own: `module` is the decoder layer that holds fc1 and fc2."""
    sizes = _Sizes(config)
    hidden, neurons = sizes.hidden, sizes.number("ffn_dim")
    embedding = sizes.number("word_embed_proj_dim", hidden)
    bias = sizes.flag("enable_bias", True)
    affine = sizes.flag("layer_norm_elementwise_affine", True)

    def norm(name: str) -> dict[str, Shape]:
        return {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)} if affine else {}

    def layer(prefix: str) -> dict[str, Shape]:
        shapes = norm(f"{prefix}.self_attn_layer_norm") | norm(f"{prefix}.final_layer_norm")
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{prefix}.self_attn.{projection}", hidden, hidden, bias)
        return shapes | ({f"{prefix}.fc1.bias": (neurons,), f"{prefix}.fc2.bias": (hidden,)} if bias else {})

    resident: dict[str, Shape] = {
        "model.decoder.embed_tokens.weight": (sizes.vocabulary, embedding),
        "model.decoder.embed_positions.weight": (sizes.number("max_position_embeddings") + 2, hidden),
    }
    if embedding != hidden:
        resident |= _linear("model.decoder.project_out", embedding, hidden, False)
        resident |= _linear("model.decoder.project_in", hidden, embedding, False)
    modules = [f"model.decoder.layers.{index}" for index in range(sizes.layers)]
    for module in modules:
        resident |= layer(module)
    if sizes.flag("do_layer_norm_before", True) and not sizes.flag("_remove_final_layer_norm", False):
        resident |= norm("model.decoder.final_layer_norm")
    tied = sizes.flag("tie_word_embeddings", True)
    if not tied:
        resident[HEAD] = (sizes.vocabulary, embedding)
    layers = tuple(FfnTensors(module, neurons, (f"{module}.fc1.weight", f"{module}.fc2.weight")) for module in modules)
    return FamilyRecipe(
        "opt", hidden, PLAIN_PARTS, layers, resident, "model.decoder.embed_tokens.weight" if tied else None
    )


# By config.json's model_type.
_RECIPES: dict[str, Callable[[Config], FamilyRecipe]] = {
    "gemma3_text": _gemma3,
    "llama": _llama,
    "mistral": _llama,
    "opt": _opt,
    "qwen2": _llama,
}


# The recipe as a message


# Tensors that follow from the configuration: rotary frequencies, a version. transformers skips them too.
IMPLIED = re.compile(r"(\.|^)(rotary_emb\.inv_freq|decoder\.version|rope_freqs\.weight)$")


def derive(checkpoint: Checkpoint) -> weightd_pb2.Recipe:
    """The recipe of a checkpoint. CheckpointError names the first tensor that is missing or has another shape than the
    configuration says, and the first one that nothing uses."""
    family = recipe_of(checkpoint.config)

    def find(name: str) -> str | None:
        return next((n for n in (name, name.removeprefix("model.")) if n in checkpoint.tensors), None)

    shapes = family.shapes()
    found = {name: find(name) for name in shapes}
    tied = {}
    head = find(HEAD)
    if family.tied_to is not None and head is not None:
        if found[family.tied_to] is None:
            found[family.tied_to] = head
        else:
            tied[HEAD] = family.tied_to
            found[HEAD], shapes[HEAD] = head, shapes[family.tied_to]
    for name, shape in shapes.items():
        source = found[name]
        if source is None:
            looked_for = " and ".join(dict.fromkeys((name, name.removeprefix("model."))))
            raise CheckpointError(f"{checkpoint.path} lacks the tensor {name} (looked for {looked_for})")
        tensor = checkpoint.tensors[source]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{name} has shape {list(tensor.shape)} in {tensor.path}, but the configuration says {list(shape)}"
            )
    unused = sorted(name for name in checkpoint.tensors.keys() - set(found.values()) if not IMPLIED.search(name))
    if unused:
        raise CheckpointError(
            f"{checkpoint.path} holds {len(unused)} tensors that its configuration has no place for, first "
            f"{checkpoint.tensors[unused[0]].name}: correct the configuration, or remove them"
        )
    recipe = weightd_pb2.Recipe()
    recipe.model.family = family.family
    recipe.model.bundle.hidden_size = family.hidden_size
    recipe.model.bundle.parts.extend(weightd_pb2.BundlePart(name=part) for part in family.parts)
    for ffn in family.layers:
        recipe.model.layers.add(module=ffn.module, neurons=ffn.neurons)
        expert = recipe.ffns.add().experts.add()
        for part, name in zip(family.parts, ffn.matrices, strict=True):
            expert.parts.add(tensor=found[name] or "", columns=part == "down", step=1)
    for name in [*family.resident, *tied]:
        whole = weightd_pb2.TensorSource(tensor=found[name] or "")
        recipe.resident.add(name=name, shape=shapes[name], source=whole, tied_to=tied.get(name, ""))
    return recipe
