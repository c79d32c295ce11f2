"""Families: tensor names and shapes, compared with what transformers makes of the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint, make_config, make_model, stored_tensors, write_torch
from conftest import answer_here
from safetensors.torch import load_file, save_file

from weightd.checkpoint.opening import open_checkpoint
from weightd.errors import CheckpointError
from weightd.importing.client_process import derive
from weightd.importing.sources import used_tensors
from weightd_proto.weightd_pb2 import Recipe

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("opt", {"word_embed_proj_dim": 48, "do_layer_norm_before": False}),
    ("opt", {"enable_bias": False}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("opt", {"_remove_final_layer_norm": True}),
    ("opt", {"tie_word_embeddings": False}),
    ("llama", {"attention_bias": True}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("llama", {"head_dim": 24}),
    ("mistral", {"head_dim": 32, "num_key_value_heads": 1}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("gemma3", {"attention_bias": True}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_recipe_has_exactly_what_transformers_has(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """config.json leaves out what equals a default."""
    config = make_config(family, **changes)
    config.save_pretrained(tmp_path)
    expected = stored_tensors(make_model(config))
    save_file(expected, tmp_path / "model.safetensors")
    recipe = resolve(tmp_path)
    shapes = {source.name: tuple(source.shape) for source in recipe.resident}
    matrices = {f"{layer.module}.{weight}" for layer in recipe.model.layers for weight in layer.weights}
    assert shapes == {name: tuple(value.shape) for name, value in expected.items() if name not in matrices}
    assert expected.keys() == shapes.keys() | matrices


def changed(tmp_path: Path, change: Any) -> Path:
    """A Llama checkpoint whose state_dict was changed by `change`."""
    folder = make_checkpoint("llama", tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    return folder


def resolve(folder: Path) -> Recipe:
    checkpoint = open_checkpoint(folder)
    recipe = derive(checkpoint, answer_here)
    used_tensors(recipe, checkpoint.tensors)
    return recipe


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        resolve(folder)


def test_wrong_shape_is_named_with_both(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda state: state.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[63\] .* the configuration says \[64\]"):
        resolve(folder)


def test_dtype_that_is_not_served_is_named(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda state: state.update({"model.norm.weight": torch.ones(64).to(torch.float8_e5m2)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has dtype F8_E5M2"):
        resolve(folder)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_names_of_the_model_without_its_head_are_found(tmp_path: Path, family: str) -> None:
    """opt-125m's files say `decoder.layers...`, models saved without a head say `layers...`."""
    model = make_model(make_config(family, tie_word_embeddings=True))
    model.config.save_pretrained(tmp_path)
    state = {name.removeprefix("model."): tensor for name, tensor in stored_tensors(model).items()}
    write_torch(state, tmp_path)
    resolve(tmp_path)
