"""The text part of each multimodal type computes, from the whole's checkpoint, what transformers' whole model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tensor_sources import computed
from transformers import AutoModel

from flashclient.errors import ModelError
from flashclient.recipes.published import published
from flashclient.recipes.text_parts import TEXT_PARTS

CONFIGS: Any = transformers.CONFIG_MAPPING
WHOLE: Any = transformers.AutoModelForImageTextToText
CAUSAL: Any = transformers.AutoModelForCausalLM
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 320,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 14}
QWEN3_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [],
    "num_position_embeddings": 16,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
    },
}
GEMMA3N = {
    "vocab_size_per_layer_input": 320,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": [48, 48],
    "activation_sparsity_pattern": [0.0, 0.0],
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
}
AUDIO = {
    "hidden_size": 32,
    "conf_num_hidden_layers": 1,
    "conf_num_attention_heads": 2,
    "sscp_conv_channel_size": [8, 8],
}
GEMMA4 = {
    "vocab_size_per_layer_input": 320,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 8,
    "num_kv_shared_layers": 0,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}

# Configurations of the whole, by model type: of the text part, of the vision tower, and the rest.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (TEXT | WINDOW, VISION, {"mm_tokens_per_image": 4, "image_token_index": 90}),
    "gemma3n": (TEXT | WINDOW | GEMMA3N, {"architecture": "mobilenetv5_300m_enc"}, {"audio_config": AUDIO}),
    "gemma4": (TEXT | WINDOW | GEMMA4, VISION, {}),
    "gemma4_unified": (TEXT | WINDOW | GEMMA4, {"mm_embed_dim": 32, "output_proj_dims": 32}, {}),
    "kimi_k25": (
        TEXT | DEEPSEEK,
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
        {"projection_hidden_size": 32, "tie_word_embeddings": False},
    ),
    "lfm2_vl": (
        TEXT | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
        {"projector_hidden_size": 32},
    ),
    "exaone4_5": (
        TEXT | WINDOW,
        {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_key_value_heads": 2}
        | {"out_hidden_size": 32},
        {},
    ),
    "mistral3": (TEXT, VISION, {"image_token_index": 90, "tie_word_embeddings": False}),
    "llama4": (
        TEXT | {"intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 2},
        VISION | {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
        {"image_token_index": 90},
    ),
    "llava": (TEXT, VISION, {"image_token_index": 90}),
    "llava_next": (TEXT, VISION, {"image_token_index": 90, "image_grid_pinpoints": [[28, 28]]}),
    "llava_onevision": (TEXT, VISION, {"image_token_index": 90, "video_token_index": 91}),
    "vipllava": (TEXT, VISION, {"image_token_index": 90, "vision_feature_layers": [-1, -1]}),
    "internvl": (
        TEXT,
        VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
        {"image_token_id": 90, "tie_word_embeddings": False},
    ),
    "idefics3": (TEXT, VISION, {"image_token_id": 90}),
    "smolvlm": (TEXT, VISION, {"image_token_id": 90}),
    "qwen2_vl": (TEXT | MROPE, QWEN_VISION | {"hidden_size": 32}, {"image_token_id": 90}),
    "qwen2_5_vl": (
        TEXT | MROPE,
        {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32},
        {"image_token_id": 90},
    ),
    "qwen3_vl": (TEXT | MROPE, QWEN3_VISION, {"image_token_id": 90}),
    "qwen3_vl_moe": (TEXT | MROPE | EXPERTS, QWEN3_VISION, {"image_token_id": 90}),
    "qwen3_5": (TEXT | LINEAR, QWEN3_VISION, {"image_token_id": 90}),
    "qwen3_5_moe": (TEXT | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 24}, QWEN3_VISION, {}),
}


@pytest.fixture(autouse=True)
def no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n's vision tower needs a package that is not installed here. Nothing here uses it."""
    real: Any = AutoModel.from_config

    def from_config(config: Any, **options: Any) -> Any:
        return torch.nn.Linear(1, 1) if config.model_type == "gemma3n_vision" else real(config, **options)

    monkeypatch.setattr(AutoModel, "from_config", from_config)


def make_whole(model_type: str, folder: Path) -> Any:
    """Saves a tiny model with random weights as its type is published, and returns it."""
    text, vision, rest = CASES[model_type]
    defaults = CONFIGS[model_type]()
    kind = {"text_config": {"model_type": defaults.text_config.model_type} | text}
    config = CONFIGS[model_type](**kind, vision_config=vision, **rest)
    torch.manual_seed(0)
    model = WHOLE.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    # transformers 5.23 calls layers blocks when it saves Kimi's text part.
    model.save_pretrained(folder, save_original_format=model_type != "kimi_k25")
    return model


def text_of(folder: Path) -> tuple[Any, Any]:
    """transformers' model of the text part, and what was left out."""
    found = published(json.loads((folder / "config.json").read_text()))
    state = load_file(folder / "model.safetensors")
    sources, left_out = found.tensors({name: tuple(tensor.shape) for name, tensor in state.items()})
    (folder / "text").mkdir()
    (folder / "text" / "config.json").write_text(json.dumps(found.config))
    tensors = {name: computed(source, state).clone().contiguous() for name, source in sources.items()}
    save_file(tensors, folder / "text" / "model.safetensors", {"format": "pt"})
    model, info = CAUSAL.from_pretrained(folder / "text", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return model.eval(), left_out


@pytest.mark.parametrize("model_type", CASES)
def test_text_part_computes_what_the_whole_model_does(model_type: str, tmp_path: Path) -> None:
    whole = make_whole(model_type, tmp_path)
    text, left_out = text_of(tmp_path)
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        expected, found = whole(input_ids=ids).logits, text(input_ids=ids).logits
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected)
    (left,) = left_out
    assert left.reason == f"vision and audio of {model_type}: only its text part runs"


def test_every_type_of_the_table_has_a_case() -> None:
    assert set(CASES) == set(TEXT_PARTS)


def test_names_before_transformers_4_52() -> None:
    whole = CONFIGS["gemma3"](text_config=TEXT).to_dict()
    shapes = {
        "language_model.model.layers.0.mlp.up_proj.weight": (48, 32),
        "language_model.lm_head.weight": (320, 32),
        "vision_tower.vision_model.post_layernorm.weight": (32,),
        "multi_modal_projector.mm_soft_emb_norm.weight": (32,),
    }
    sources, (left,) = published(whole).tensors(shapes)
    assert set(sources) == {"model.layers.0.mlp.up_proj.weight", "lm_head.weight"}
    assert len(left.tensors) == 2


def test_flat_configurations_of_the_first_qwen2_vl() -> None:
    flat = {
        "model_type": "qwen2_vl",
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    }
    config = published(flat | {key: value for key, value in TEXT.items() if key != "head_dim"}).config
    assert config["model_type"] == "qwen2"
    assert config["hidden_size"] == 32
    assert config["tie_word_embeddings"]
    assert "mrope_section" not in json.dumps(config)


def test_tensors_under_two_names_are_refused() -> None:
    whole = CONFIGS["gemma3"](text_config=TEXT).to_dict()
    names = ("language_model.model.norm.weight", "model.language_model.norm.weight")
    with pytest.raises(ModelError, match=r"holds model\.norm\.weight under two names"):
        published(whole).tensors(dict.fromkeys(names, (32,)))


@pytest.mark.parametrize("shape", [(4, 32, 48), (4, 48, 32)])
def test_experts_of_qwen3_vl_moe_are_taken_in_either_order(shape: tuple[int, ...]) -> None:
    """As transformers takes them: the model's hidden size tells the two apart."""
    text = {"hidden_size": 32, "moe_intermediate_size": 24, "num_hidden_layers": 1}
    config = published(CONFIGS["qwen3_vl_moe"](text_config=text).to_dict())
    sources, _ = config.tensors({"model.language_model.layers.0.mlp.experts.gate_up_proj": shape})
    (source,) = sources.values()
    tensor = torch.zeros(shape)
    assert computed(source, {"model.language_model.layers.0.mlp.experts.gate_up_proj": tensor}).shape == (4, 48, 32)
