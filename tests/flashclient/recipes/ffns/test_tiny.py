"""Tiny instances of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, BartConfig, PreTrainedConfig, T5Config

from flashclient.errors import ModelError
from flashclient.recipes.ffns.sites import layers_needed, weightless
from flashclient.recipes.ffns.tiny import VOCABULARY, model_class, tiny_config, tiny_model
from flashclient.recipes.ffns.watching import run
from flashclient.torch_state import one_thread

PARAMETERS_MAX = 2_000_000


def config_of(kind: str, **changes: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.for_model(kind, **changes)
    return config


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "opt", "deepseek_v3", "gpt_oss", "jamba", "gemma3n_text"])
@one_thread()
def test_a_tiny_model_runs(kind: str) -> None:
    model = tiny_model(*model_class(config_of(kind)))
    assert sum(parameter.numel() for parameter in model.parameters()) < PARAMETERS_MAX
    assert bool(torch.isfinite(run(model).logits).all())


@one_thread()
def test_a_tiny_model_depends_on_its_config_alone() -> None:
    torch.manual_seed(1)
    one = tiny_model(*model_class(config_of("llama"))).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other = tiny_model(*model_class(config_of("llama"))).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_flags_and_functions_stay() -> None:
    config = config_of("llama", hidden_act="relu", mlp_bias=True, rms_norm_eps=1e-3, tie_word_embeddings=True)
    tiny = tiny_config(config)
    for name in ("hidden_act", "mlp_bias", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(tiny, name) == getattr(config, name)


@pytest.mark.parametrize(("heads", "key_value_heads", "ratio"), [(32, 32, 1), (32, 8, 2), (64, 1, 4)])
def test_key_and_value_heads_stay_shared_or_not(heads: int, key_value_heads: int, ratio: int) -> None:
    tiny = tiny_config(config_of("llama", num_attention_heads=heads, num_key_value_heads=key_value_heads, head_dim=64))
    assert tiny.num_attention_heads == ratio * tiny.num_key_value_heads


def test_lists_by_layer_are_cut() -> None:
    config = config_of("gemma3n_text")
    tiny = tiny_config(config, 12)
    assert tiny.layer_types == config.layer_types[:12]
    assert tiny.activation_sparsity_pattern == config.activation_sparsity_pattern[:12]
    assert len(tiny.intermediate_size) == 12
    assert tiny.num_kv_shared_layers == 5


@pytest.mark.parametrize(
    ("kind", "changes", "share", "real", "tiny"),
    [
        ("phi3", {"num_attention_heads": 32}, 1.0, 48, 8),
        ("phi3", {"num_attention_heads": 24, "partial_rotary_factor": 0.75}, 0.75, 48, 6),  # Phi-4-mini
        ("minicpm3", {"qk_rope_head_dim": 32}, 1.0, 16, 4),
    ],
)
def test_factors_of_rotary_frequencies_are_as_many_as_these(
    kind: str, changes: dict[str, Any], share: float, real: int, tiny: int
) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": share}
    rope |= {"short_factor": [1.0] * real, "long_factor": [1.0] * real, "original_max_position_embeddings": 4096}
    config = AutoConfig.for_model(kind, rope_parameters=rope, **changes)
    model = tiny_model(*model_class(config))
    run(model)
    made = model.config.rope_parameters
    assert len(made["short_factor"]) == len(made["long_factor"]) == tiny


def test_an_index_leaves_tokens_out() -> None:
    """Otherwise no proof shows what a model does where it picks some of many tokens."""
    assert tiny_config(config_of("deepseek_v32", index_topk=2048)).index_topk == 4


def test_numbers_of_layers_beyond_the_last_are_dropped() -> None:
    assert tiny_config(config_of("qwen3_moe", mlp_only_layers=[0, 2, 9])).mlp_only_layers == [0, 2]


def test_token_ids_are_in_the_vocabulary() -> None:
    tiny = tiny_config(config_of("llama", vocab_size=128256, bos_token_id=128000, eos_token_id=[128001, 128009]))
    ids = [tiny.bos_token_id, *tiny.eos_token_id]
    assert tiny.vocab_size == VOCABULARY
    assert all(token < VOCABULARY for token in ids)
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    ("kind", "changes", "layers"),
    [
        ("deepseek_v3", {}, 4),  # three dense layers first
        ("deepseek_v3", {"first_k_dense_replace": 7}, 8),
        ("qwen3_moe", {"decoder_sparse_step": 6}, 6),
        ("jamba", {}, 5),  # attention in layer 4
        ("gemma3_text", {}, 6),  # full attention in layer 5
        ("gemma3n_text", {}, 12),  # ten sparse layers first
    ],
)
def test_a_tiny_model_has_every_kind_of_layer(kind: str, changes: dict[str, Any], layers: int) -> None:
    assert layers_needed(weightless(*model_class(config_of(kind, **changes)))) == layers


@pytest.mark.parametrize(("expand", "heads"), [(2, 128), (2, 4), (1, 2)])
def test_heads_of_mamba_fit_whatever_they_are(expand: int, heads: int) -> None:
    config = config_of("bamba", mamba_expand=expand, mamba_n_heads=heads, mamba_d_head=expand * 4096 // heads)
    tiny = tiny_config(config)
    assert tiny.mamba_n_heads * tiny.mamba_d_head == expand * tiny.hidden_size


def test_a_class_that_cannot_be_made_is_refused_in_one_line() -> None:
    config = config_of("deepseek_v2", num_experts_per_tok=6)
    config.hidden_act = "no such function"
    with pytest.raises(
        ModelError, match=r"^config\.json: no tiny DeepseekV2ForCausalLM could be made: .*no such function.*$"
    ):
        tiny_model(*model_class(config))


def test_a_type_without_causal_language_model_is_refused() -> None:
    with pytest.raises(ModelError, match="no causal language model for model_type 't5'"):
        model_class(T5Config())
    tiny_model(*model_class(BartConfig()))  # its decoder alone
