"""Records of models that were imported before a record said how its FFNs are installed (Model.model_class).

There were five classes then. What a record says today follows from the class and its config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flashclient.errors import ModelError
from weightd_proto import weightd_pb2

# By the kernels' name: transformers' names for classes of the same function. Its other names for a function
# (gelu_python, gelu_python_tanh) stand for objects of one of these classes.
TRANSFORMERS_NAMES = {
    "relu": ("relu",),
    "relu_squared": ("relu2",),
    "silu": ("silu", "swish"),
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate"),
}


@dataclass(frozen=True)
class _Ffn:
    """The FFNs of one class.

    Attributes:
        activation: the name of the activation in the config.
        projections: the modules that hold the matrices, below the layer's module.
    """

    activation: str
    projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    place: weightd_pb2.Layer.Place = weightd_pb2.Layer.MODULE


CLASSES = {
    "Gemma3ForCausalLM": _Ffn("hidden_activation"),
    "LlamaForCausalLM": _Ffn("hidden_act"),
    "MistralForCausalLM": _Ffn("hidden_act"),
    "OPTForCausalLM": _Ffn("activation_function", ("fc1", "fc2"), weightd_pb2.Layer.PARTS),
    "Qwen2ForCausalLM": _Ffn("hidden_act"),
}


def completed(record: weightd_pb2.Model, config: PreTrainedConfig) -> weightd_pb2.Model:
    """The record with all that a record says today.

    Raises:
        ModelError: the class was not known then, or no kernel has the activation.
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if name not in CLASSES:
        found = f"model_type {config.model_type!r}"
        raise ModelError(f"unknown architecture ({found}): {', '.join(sorted(CLASSES))} could be imported then")
    ffn = CLASSES[name]
    full = weightd_pb2.Model()
    full.CopyFrom(record)
    full.model_class = name
    activation: Any = getattr(config, ffn.activation)
    full.activation.function = activation_name(ACT2FN[activation])
    tensors = {tensor.name for tensor in record.resident}
    for layer in full.layers:
        layer.place = ffn.place
        layer.weights[:] = [f"{projection}.weight" for projection in ffn.projections]
        first, *_, last = (f"{layer.module}.{projection}.bias" for projection in ffn.projections)
        if first in tensors:
            layer.biases.add(part=full.bundle.parts[0].name, tensor=first, step=1)
        if last in tensors:
            layer.output_bias = last
    return full


def activation_name(function: nn.Module) -> str:
    """The kernels' name of transformers' activation `function`. Raises ModelError where no kernel has it."""
    for name, transformers_names in TRANSFORMERS_NAMES.items():
        if type(function) in {type(ACT2FN[transformers_name]) for transformers_name in transformers_names}:
            return name
    known = ", ".join(TRANSFORMERS_NAMES)
    raise ModelError(f"no kernel for activation {type(function).__name__}: {known} have one")
