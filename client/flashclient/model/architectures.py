"""Where the FFNs are in transformers' models, and how streamed FFNs are put in their place.

Everything else about a model comes from its config and from the daemon's record of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flashclient.errors import ModelError
from flashclient.model.absent_weights import AbsentProjection, Between, FirstOfTwo, LastOfTwo, absent_activation, fix


@dataclass(frozen=True)
class Architecture:
    """The names of the parts of an FFN in one class of transformers.

    Attributes:
        activation: the attribute of the FFN's module that holds the activation function.
        has_module: whether the module is the FFN's alone; otherwise it is the decoder layer, which calls the parts.
        weights: names, below the module, of the matrices that the bundles hold.
        bias, output_bias: names, below the module, of the resident biases.
        context_is_fixed: whether no sequence can be longer than max_position_embeddings, because the model has a
            learned embedding for each place in a sequence.
    """

    activation: str
    weights: tuple[str, ...]
    has_module: bool = True
    bias: str | None = None
    output_bias: str | None = None
    context_is_fixed: bool = False


_GATED = Architecture(activation="act_fn", weights=("gate_proj.weight", "up_proj.weight", "down_proj.weight"))

# OPT has no module for the FFN: its decoder layer calls fc1, activation_fn and fc2.
_OPT = Architecture(
    activation="activation_fn",
    weights=("fc1.weight", "fc2.weight"),
    has_module=False,
    bias="fc1.bias",
    output_bias="fc2.bias",
    context_is_fixed=True,
)

ARCHITECTURES = {
    "Gemma3ForCausalLM": _GATED,
    "LlamaForCausalLM": _GATED,
    "MistralForCausalLM": _GATED,
    "OPTForCausalLM": _OPT,
    "Qwen2ForCausalLM": _GATED,
}


def architecture_of(config: PreTrainedConfig) -> tuple[str, Architecture]:
    """The class that transformers' AutoModelForCausalLM takes: that of the config's `model_type`, whatever its
    `architectures` say. Raises ModelError, which names the known classes."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if name in ARCHITECTURES:
        return name, ARCHITECTURES[name]
    found = f"model_type {config.model_type!r}"
    raise ModelError(f"unknown architecture ({found}): {', '.join(sorted(ARCHITECTURES))} can be run")


def install_streamed(model: nn.Module, module: str, architecture: Architecture, ffn: nn.Module) -> None:
    """Puts `ffn` in the place of the FFN at path `module`, with absent weights under the names of its weights."""
    old = model.get_submodule(module)
    names = [name.rpartition(".")[0] for name in architecture.weights]
    if architecture.has_module:
        for name in names:
            setattr(ffn, name, AbsentProjection(f"{module}.{name}", old.get_submodule(name)))
        activation = getattr(old, architecture.activation)
        setattr(ffn, architecture.activation, absent_activation(f"{module}.{architecture.activation}", activation))
        fix(ffn, (*names, architecture.activation))
        parent, _, attribute = module.rpartition(".")
        setattr(model.get_submodule(parent), attribute, ffn)
        return
    first_name, last_name = names
    first = FirstOfTwo(f"{module}.{first_name}", old.get_submodule(first_name), ffn)
    last = LastOfTwo(f"{module}.{last_name}", old.get_submodule(last_name), first)
    parts = {
        first_name: first,
        last_name: last,
        architecture.activation: Between(f"{module}.{architecture.activation}", first),
    }
    for name, part in parts.items():
        setattr(old, name, part)
    fix(old, tuple(parts))
