"""Families: tensor names and shapes, compared with what transformers makes of the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint, make_config, make_model, stored_tensors, write_torch
from safetensors.torch import load_file, save_file

from weightd.checkpoint.opening import open_checkpoint
from weightd.errors import CheckpointError
from weightd.importing.families import derive, recipe_of
from weightd.importing.sources import used_tensors

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
def test_recipe_names_exactly_what_transformers_has(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    config = make_config(family, **changes)
    config.save_pretrained(tmp_path)
    saved = open_config(tmp_path)
    expected = {name: tuple(tensor.shape) for name, tensor in stored_tensors(make_model(config)).items()}
    assert recipe_of(saved).shapes() == expected


def open_config(folder: Path) -> dict[str, Any]:
    """The configuration as it is on disk: without values that equal the default."""
    from weightd.checkpoint.checkpoint import read_json

    return read_json(folder / "config.json")


def test_ffn_module_is_where_transformers_has_it() -> None:
    for family in FAMILIES:
        config = make_config(family)
        model = make_model(config)
        for ffn in recipe_of(config.to_dict()).layers:
            module = model.get_submodule(ffn.module)
            for matrix in ffn.matrices:
                assert module.get_parameter(matrix.removeprefix(f"{ffn.module}.")).shape


def test_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(CheckpointError, match=r"unknown architecture 'mamba': known are gemma3_text, llama, mistral, "):
        recipe_of({"model_type": "mamba"})


@pytest.mark.parametrize("value", [None, 0, "64", -1])
def test_configuration_without_a_size_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"hidden_size = "):
        recipe_of({"model_type": "llama", "hidden_size": value})


def changed(tmp_path: Path, change: Any) -> Path:
    """A Llama checkpoint whose state_dict was changed by `change`."""
    folder = make_checkpoint("llama", tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    return folder


def resolve(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    used_tensors(derive(checkpoint), checkpoint.tensors)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        resolve(folder)


def test_wrong_shape_is_named_with_both(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda state: state.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[63\] .* the configuration says \[64\]"):
        resolve(folder)


def test_dtype_that_is_not_served_is_named(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda state: state.update({"model.norm.weight": torch.ones(64, dtype=torch.float64)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has dtype F64"):
        resolve(folder)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_names_of_the_model_without_its_head_are_found(tmp_path: Path, family: str) -> None:
    """opt-125m's files say `decoder.layers...`, models saved without a head say `layers...`."""
    model = make_model(make_config(family, tie_word_embeddings=True))
    model.config.save_pretrained(tmp_path)
    state = {name.removeprefix("model."): tensor for name, tensor in stored_tensors(model).items()}
    write_torch(state, tmp_path)
    resolve(tmp_path)
