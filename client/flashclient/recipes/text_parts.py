"""Text parts of multimodal checkpoints: their class of transformers, and the names of their tensors.

AutoModelForCausalLM runs most multimodal models whole. Here only their text part runs, in the class that computes the
same for text alone. Towers and projectors are left out. tests/flashclient/recipes/test_text_parts.py compares each type
with transformers' whole model.

Where the text part has no class of its own for text alone (Qwen-VL), rotary embeddings have three positions for each
token, which are equal for text. So Qwen's plain classes compute the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flashclient.errors import ModelError
from flashclient.recipes.configs import read_config
from flashclient.recipes.renaming import Omission, Rename, Target, rename

Config = Mapping[str, Any]

TOWERS = (
    r"(model\.)?(vision_tower|vision_model|vision_encoder|visual|vision_embedder|image_newline|image_tower|video_tower"
    r"|audio_tower|audio_model|embed_vision|embed_audio|multi_modal_projector|mm_projector|vision_projection|aligner"
    r"|visual_embeddings_table|connector|mlp_AR|projector|encoder|vqmodel|generation_(embeddings|aligner|head))(\..+)?"
)
# Names before transformers 4.52, names since then, and names of models that were saved without their head.
LANGUAGE_MODEL = (
    rename(r"(?:model\.)?language_model\.lm_head\.(.+)", r"lm_head.\1"),
    rename(r"language_model\.model\.(.+)", r"model.\1"),
    rename(r"(?:model\.)?language_model\.(.+)", r"model.\1"),
)
TEXT_MODEL = (rename(r"(?:model\.)?text_model\.(.+)", r"model.\1"),)


@dataclass(frozen=True)
class TextPart:
    """The text part of a multimodal model type.

    Attributes:
        model_type: of transformers' class for it; empty: that of its configuration.
        constants: what that class needs to be told, because the whole model computes nothing else.
        swaps_experts: the checkpoint has the last two dimensions of experts in the other order than that class.
    """

    renames: tuple[Rename, ...] = LANGUAGE_MODEL
    model_type: str = ""
    constants: Mapping[str, Any] = field(default_factory=dict)
    swaps_experts: bool = False


# By the model_type of the whole.
TEXT_PARTS: dict[str, TextPart] = {
    **dict.fromkeys(("gemma3", "gemma3n", "gemma4", "gemma4_unified", "llama4", "mistral3"), TextPart()),
    **dict.fromkeys(("llava", "llava_next", "llava_onevision", "vipllava", "internvl"), TextPart()),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "kimi_k25", "lfm2_vl", "exaone4_5"), TextPart()),
    **dict.fromkeys(("llava_next_video", "video_llava", "paligemma", "deepseek_vl", "lighton_ocr", "aria"), TextPart()),
    **dict.fromkeys(("janus", "ovis2", "voxtral", "qwen2_audio", "glmasr"), TextPart()),
    **dict.fromkeys(("aya_vision", "cohere2_vision"), TextPart(constants={"logit_scale": 1.0})),
    "granite_speech": TextPart(constants={"logits_scaling": 1.0}),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), TextPart(TEXT_MODEL)),
    "glm4v": TextPart(model_type="glm4"),
    "glm4v_moe": TextPart(model_type="glm4_moe"),
    "qwen2_vl": TextPart(model_type="qwen2"),
    "qwen2_5_vl": TextPart(model_type="qwen2"),
    "qwen3_vl": TextPart(model_type="qwen3"),
    "qwen3_vl_moe": TextPart(model_type="qwen3_moe", constants={"norm_topk_prob": True}, swaps_experts=True),
}


def text_renames(part: TextPart, config: Config) -> tuple[Rename, ...]:
    """The names of the tensors of `part`, whose own configuration is `config`."""
    if not part.swaps_experts:
        return part.renames
    experts = r"(?:(?:model|language_model)\.)*(layers\.\d+\.mlp\.experts\."
    gate_up = rename(rf"{experts}gate_up_proj)", Target(r"model.\1", columns=config["hidden_size"]))
    down = rename(rf"{experts}down_proj)", Target(r"model.\1", columns=config["moe_intermediate_size"]))
    return (gate_up, down, *part.renames)


def omissions(model_type: str) -> tuple[Omission, ...]:
    return (Omission(TOWERS, f"vision and audio of {model_type}: only its text part runs"),)


def text_config(config: Config, part: TextPart) -> dict[str, Any]:
    """The configuration of the text part, as config.json of its own class. Raises ModelError where it has none."""
    whole = read_config(config)
    text = whole.get_text_config(decoder=True)
    if text is whole:
        raise ModelError(f"config.json of model type {config['model_type']} has no text_config")
    values: dict[str, Any] = json.loads(text.to_json_string(use_diff=False))
    values["model_type"] = part.model_type or text.model_type
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(values["model_type"])
    if model_class is None:
        raise ModelError(f"transformers has no class for the text part of {config['model_type']} ({text.model_type})")
    values["architectures"] = [model_class]
    values["tie_word_embeddings"] = bool(
        getattr(whole, "tie_word_embeddings", getattr(text, "tie_word_embeddings", False))
    )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype"):
        if values.get(key) is None:
            values[key] = config.get(key) if key != "dtype" else config.get("dtype", config.get("torch_dtype"))
    if part.model_type:
        values["rope_parameters"] = _plain_rope(values.get("rope_parameters"))
        values.pop("rope_scaling", None)
    return {**values, **part.constants}


def _plain_rope(parameters: Any) -> Any:
    """Rotary parameters without the sections for several positions of a token."""
    if not isinstance(parameters, dict):
        return parameters
    plain = {key: value for key, value in parameters.items() if not key.startswith("mrope_")}
    for key in ("rope_type", "type"):
        if plain.get(key) == "mrope":
            plain[key] = "default"
    return plain
