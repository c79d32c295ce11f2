"""What a published checkpoint is to transformers: a configuration, tensor names and an activation, by data.

Most checkpoints are what they say. Of multimodal ones the text part runs (text_parts.py). Some formats have remote
code, which is never executed, and a class of transformers with the same mathematics (remote_formats.py). Everything
else is refused in one line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flashclient.errors import ModelError
from flashclient.model.activations import FUNCTIONS
from flashclient.recipes.remote_formats import ARCHITECTURES, REMOTE_FORMATS, RemoteFormat
from flashclient.recipes.renaming import Omission, Rename, Shapes, Target, rename, renamed
from flashclient.recipes.text_parts import TEXT_PARTS, omissions, text_config, text_renames
from weightd_proto import weightd_pb2

Config = Mapping[str, Any]

QUANTISATION = "quantization_config"  # the import dequantises
WORDS = ".qweight"
OF_WORDS = ("gptq", "awq", "auto-round")
ACTIVATIONS = tuple(name for name in FUNCTIONS if name != "swish")  # which no published format needs


@dataclass(frozen=True)
class Published:
    """A published checkpoint, in transformers' terms.

    Attributes:
        config: config.json of a class that AutoModelForCausalLM knows.
        activation: what the FFNs compute instead of what that class computes; None: what it computes. The reference
            that computes it is made by reference.amend().
        notes: what a user should know, one line each.
        words: tensors named WORDS are quantised matrices with a row for each input, the transpose of transformers'.
    """

    config: dict[str, Any]
    activation: weightd_pb2.Activation | None = None
    notes: tuple[str, ...] = ()
    renames: tuple[Rename, ...] = ()
    omissions: tuple[Omission, ...] = ()
    words: bool = False

    def tensors(self, shapes: Shapes) -> tuple[dict[str, weightd_pb2.TensorSource], list[weightd_pb2.LeftOut]]:
        """The source of each tensor of transformers' checkpoint, and the tensors that are left out.

        Args:
            shapes: of the published checkpoint's tensors, by name.

        Raises:
            ModelError: they contradict the configuration.
        """
        if not self.words:
            return renamed(self.renames, self.omissions, shapes)
        names = {name.removesuffix(WORDS) + ".weight": name for name in shapes if name.endswith(WORDS)}
        swapped = {name.removesuffix(WORDS) + ".weight": shapes[name][::-1] for name in names.values()}
        both = sorted(swapped.keys() & shapes.keys())
        if both:
            raise ModelError(f"the checkpoint holds {both[0]} beside {names[both[0]]}")
        plain = {name: shape for name, shape in shapes.items() if not name.endswith(WORDS)}
        sources, left_out = renamed(self.renames, self.omissions, plain | swapped)
        for each in left_out:
            each.tensors[:] = [names.get(name, name) for name in each.tensors]
        return {name: _in_rows_of_inputs(source, names) for name, source in sources.items()}, left_out


def published(config: Config, activation: str | None = None) -> Published:
    """The checkpoint with this config.json.

    Args:
        activation: `--activation`, NAME or NAME:PARAMETER: what the FFNs compute, whatever the configuration says.

    Raises:
        ModelError: no class of transformers is known to run it, or a value of its configuration has another meaning
            there.
    """
    chosen = None if activation is None else parse_activation(activation)
    found = _published({key: value for key, value in config.items() if key != QUANTISATION}, chosen is not None)
    quantisation = config.get(QUANTISATION)
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    renames = (*_quantised_renames(method), *found.renames)
    return replace(found, activation=chosen or found.activation, renames=renames, words=method in OF_WORDS)


def _quantised_renames(method: Any) -> tuple[Rename, ...]:
    """transformers dequantises experts of MXFP4 to the transpose of what the checkpoint holds."""
    if method != "mxfp4":
        return ()
    return (rename(r"(.+\.(?:gate_up_proj|down_proj))", Target(r"\1", swapped=True)),)


def _in_rows_of_inputs(source: weightd_pb2.TensorSource, names: Mapping[str, str]) -> weightd_pb2.TensorSource:
    """A source of tensors as transformers has them, some of which lie transposed, under names of their own."""
    found = weightd_pb2.TensorSource()
    found.CopyFrom(source)
    match source.WhichOneof("of"):
        case "concatenated":
            for part in found.concatenated.parts:
                part.CopyFrom(_in_rows_of_inputs(part, names))
        case "slice":
            found.slice.of.CopyFrom(_in_rows_of_inputs(source.slice.of, names))
        case "transposed":
            found.transposed.of.CopyFrom(_in_rows_of_inputs(source.transposed.of, names))
        case _ if source.tensor in names:
            whole = weightd_pb2.TensorSource(tensor=names[source.tensor])
            return weightd_pb2.TensorSource(transposed=weightd_pb2.Transposed(of=whole, dim0=0, dim1=1))
    return found


def parse_activation(text: str) -> weightd_pb2.Activation:
    """The value of `--activation`. Raises ModelError for an unknown name."""
    name, _, parameter = text.partition(":")
    number = re.fullmatch(r"\d+(\.\d*)?(e-?\d+)?", parameter)
    if name not in ACTIVATIONS or (name == "fatrelu") != (number is not None) or (parameter and number is None):
        raise ModelError(
            f"unknown activation {text!r}: known are {', '.join(ACTIVATIONS)}, fatrelu as fatrelu:THRESHOLD"
        )
    return weightd_pb2.Activation(function=name, parameter=float(parameter or 0))


def _published(config: Config, activation_given: bool) -> Published:
    model_type = _model_type(config)
    part = TEXT_PARTS.get(model_type)
    if part is not None and model_type in CONFIG_MAPPING:
        text = text_config(config, part)
        notes = (f"only the text part of {model_type} runs",)
        return Published(text, None, notes, text_renames(part, text), omissions(model_type))
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kept = {key: value for key, value in config.items() if key != "auto_map"}
        return Published(kept | {"model_type": model_type})
    known = REMOTE_FORMATS.get(model_type)
    if known is not None:
        return _from_remote_format(config, known, activation_given)
    raise ModelError(_refusal(config, model_type))


def _model_type(config: Config) -> str:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type:
        # As AutoConfig does.
        return "ministral" if model_type == "mistral" and "layer_types" in config else model_type
    for architecture in config.get("architectures") or ():
        if architecture in ARCHITECTURES:
            return ARCHITECTURES[architecture]
    raise ModelError("config.json has no model_type, so its architecture is unknown: add the key")


def _from_remote_format(config: Config, known: RemoteFormat, activation_given: bool) -> Published:
    for key, allowed in known.required.items():
        if key == "hidden_act" and activation_given:
            continue
        if config.get(key, allowed[0]) not in allowed:
            raise ModelError(
                f"config.json has {key} = {config[key]!r}: model type {_model_type(config)} runs as "
                f"{known.model_class}, which is right for {' or '.join(repr(value) for value in allowed)} only"
            )
    dropped = {"auto_map", "architectures", "model_type", "hidden_act_param", *known.required} - {"hidden_act"}
    values = {known.keys.get(key, key): value for key, value in config.items() if key not in dropped}
    values |= known.computed(config)
    values |= {"model_type": known.model_type, "architectures": [known.model_class]}
    return Published(values, known.activation(config), known.notes(config), known.renames(config), known.omissions)


def _refusal(config: Config, model_type: str) -> str:
    if model_type in CONFIG_MAPPING:
        if isinstance(config.get("text_config"), dict):
            return f"the text part of {model_type!r} is not known to run alone: it is for {', '.join(TEXT_PARTS)}"
        return f"transformers has no causal language model of type {model_type!r}"
    if config.get("auto_map"):
        known = ", ".join(REMOTE_FORMATS)
        return (
            f"model type {model_type!r} needs code from its publisher, which is never executed; known without it are "
            f"{known}, and what transformers has"
        )
    return f"unknown model type {model_type!r}: it may need a newer transformers"
