"""The text part of each multimodal type computes, from the whole's checkpoint, what transformers' whole model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from multimodal_checkpoints import CASES, CONFIGS, TEXT, make_whole
from safetensors.torch import load_file, save_file

from flashclient.errors import ModelError
from flashclient.recipes.published import published
from flashclient.recipes.text_parts import TEXT_PARTS
from flashclient.tensors.places import gather

CAUSAL: Any = transformers.AutoModelForCausalLM


def text_of(folder: Path) -> tuple[Any, Any]:
    """transformers' model of the text part, and what was left out."""
    found = published(json.loads((folder / "config.json").read_text()))
    state = load_file(folder / "model.safetensors")
    sources, left_out = found.tensors({name: tuple(tensor.shape) for name, tensor in state.items()})
    (folder / "text").mkdir()
    (folder / "text" / "config.json").write_text(json.dumps(found.config))
    tensors = {name: gather(source, state).clone().contiguous() for name, source in sources.items()}
    save_file(tensors, folder / "text" / "model.safetensors", {"format": "pt"})
    model, info = CAUSAL.from_pretrained(folder / "text", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return model.eval(), left_out


@pytest.mark.parametrize("model_type", [model_type for model_type in CASES if model_type in CONFIGS])
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
    assert gather(source, {"model.language_model.layers.0.mlp.experts.gate_up_proj": tensor}).shape == (4, 48, 32)
