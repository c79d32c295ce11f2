"""The models that this project is for, by their names: tiny ones in their published formats give transformers' tokens.

A row has what is special in the model's published configuration; sizes are tiny. Others are in
test_published_models.py (text parts), test_quantised.py (MXFP4 and FP8) and test_gguf_architectures.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_model, write_torch
from daemon import Daemon, serving
from multimodal_checkpoints import make_whole
from predictors import everything, publish_predictors
from published_checkpoints import (
    BAMBOO,
    CHATGLM,
    SPARSE_LLAMA,
    TURBOSPARSE_MIXTRAL,
    chatglm_state,
    llama,
    reference_of,
    state_of,
    turbosparse_mixtral_state,
    write_published,
)
from quantised_checkpoints import make_fp8, make_gpt_oss
from transformers import AutoConfig

from flashclient import FlashClient
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store
from weightd_proto.weightd_pb2 import Layer

IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
TOLERANCE = 1e-3  # of the largest logit
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
HEADS = {"head_dim": 32}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
OPT = SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64, "tie_word_embeddings": True}
PHI = SIZES | {"intermediate_size": 96}
FALCON_7B = SIZES | {"multi_query": True, "parallel_attn": True, "bias": False, "alibi": False}
FALCON_40B = SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False, "alibi": False}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
GEMMA = GATED | HEADS | {"tie_word_embeddings": True}
LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "head_dim": 8,
}


@dataclass(frozen=True)
class Row:
    """How a tiny model is made.

    Attributes:
        config: of a type of transformers, and its values; empty if `write` makes everything.
        write: writes the checkpoint into a folder, and returns the model with its tokens.
        place: where its FFNs are.
        predict: whether it runs in predict mode, too.
    """

    model_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    write: Callable[[Path], Any] | None = None
    place: int = Layer.MODULE
    predict: bool = False


def remote(config: dict[str, Any], state: Callable[[], Any]) -> Callable[[Path], Any]:
    def write(folder: Path) -> Any:
        write_published(config, state(), folder)
        return reference_of(config, state(), folder.with_name("reference"))

    return write


def torch_file(folder: Path) -> Any:
    """pytorch_model.bin, as ReLULLaMA 7B is published."""
    model = made("llama", GATED | {"hidden_act": "relu"})
    folder.mkdir()
    model.config.save_pretrained(folder)
    write_torch(model.state_dict(), folder)
    return model


def quantised(folder: Path) -> Any:
    return make_gpt_oss(folder).reference(folder.with_name("plain"))


def fp8(folder: Path) -> Any:
    return make_fp8("deepseek_v3", folder).reference(folder.with_name("plain"))


def untied() -> Any:
    return state_of(llama(tied=False))


MODELS: dict[str, Row] = {
    "OPT-6.7B": Row("opt", OPT, place=Layer.PARTS, predict=True),
    "OPT-350m": Row("opt", OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}, place=Layer.PARTS),
    "Falcon-7B": Row("falcon", FALCON_7B),
    "Falcon-40B": Row("falcon", FALCON_40B),
    "Falcon-7B relufied": Row("falcon", FALCON_7B | {"activation": "relu"}, predict=True),
    "Persimmon-8B": Row("persimmon", PHI | {"hidden_act": "relu2", "qk_layernorm": True}, predict=True),
    "Phi-2": Row("phi", PHI | {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5}),
    "Phi-3-mini": Row("phi3", GATED | {"sliding_window": 8}),
    "Llama-2-7B": Row("llama", GATED | {"num_key_value_heads": 4}),
    "Llama-3.1-8B": Row("llama", GATED | {"rope_parameters": LLAMA3}),
    "ReLULLaMA-7B": Row(write=torch_file, predict=True),
    "ProSparse-Llama-2-7B": Row(write=remote(SPARSE_LLAMA, untied), predict=True),
    "Bamboo-7B": Row(write=remote(BAMBOO, untied), predict=True),
    "TurboSparse-Mistral": Row(write=remote(BAMBOO | {"sliding_window": None}, untied)),
    "TurboSparse-Mixtral": Row(write=remote(TURBOSPARSE_MIXTRAL, turbosparse_mixtral_state), place=Layer.EXPERTS),
    "Mistral-7B": Row("mistral", GATED | {"sliding_window": 8}),
    "Qwen2-7B": Row("qwen2", GATED),
    "Qwen2.5-0.5B": Row("qwen2", GATED | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "Qwen3-8B": Row("qwen3", GATED | HEADS),
    "Gemma-7B": Row("gemma", GEMMA | {"hidden_activation": "gelu_pytorch_tanh"}),
    "Gemma-2-2B": Row("gemma2", GEMMA | {"query_pre_attn_scalar": 32, "sliding_window": 8}),
    "Gemma-3-270m": Row("gemma3_text", GEMMA | {"query_pre_attn_scalar": 32, "sliding_window": 8}),
    "Gemma-3n-E2B": Row(write=lambda folder: make_whole("gemma3n", folder)),
    "ChatGLM3-6B": Row(write=remote(CHATGLM, chatglm_state)),
    "GLM-4-9B": Row("glm", GATED | {"head_dim": 16, "attention_bias": True}),
    "GLM-4-9B-0414": Row("glm4", GATED | {"head_dim": 16}),
    "Mixtral-8x7B": Row("mixtral", GATED | EXPERTS, place=Layer.EXPERTS),
    "Qwen1.5-MoE-A2.7B": Row(
        "qwen2_moe", GATED | EXPERTS | {"shared_expert_intermediate_size": 40}, place=Layer.EXPERTS
    ),
    "Qwen3-30B-A3B": Row("qwen3_moe", GATED | HEADS | EXPERTS | {"norm_topk_prob": True}, place=Layer.EXPERTS),
    "gpt-oss-20b": Row(write=quantised, place=Layer.EXPERTS),
    "OLMoE-1B-7B": Row("olmoe", GATED | EXPERTS | {"num_key_value_heads": 4}, place=Layer.EXPERTS),
    "DeepSeek-V2-Lite": Row(
        "deepseek_v2", GATED | LATENT | {"q_lora_rank": None, "topk_method": "greedy"}, place=Layer.EXPERTS
    ),
    "DeepSeek-V3": Row(write=fp8, place=Layer.EXPERTS),
}


def made(model_type: str, config: dict[str, Any]) -> Any:
    return make_model(AutoConfig.for_model(model_type, **config))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Daemon]]:
    """A store, and the daemon that serves it. Models are imported while it runs."""
    store = tmp_path_factory.mktemp("named") / "store"
    Store.open(store, create=True).close()
    with serving(store, "--dram", "256MiB", "--cold-start") as started:
        yield store, started


@pytest.mark.parametrize("name", MODELS)
def test_model_gives_the_tokens_of_transformers(name: str, daemon: tuple[Path, Daemon], tmp_path: Path) -> None:
    row, (store, started) = MODELS[name], daemon
    folder = tmp_path / "checkpoint"
    if row.write is not None:
        reference = row.write(folder)
    else:
        reference = made(row.model_type, row.config)
        reference.save_pretrained(folder)
    model = "".join(character if character.isalnum() else "-" for character in name)
    with Store.open(store) as opened:
        record = import_checkpoint(folder, opened, name=model, dtype="fp32")
    assert row.place in {layer.place for layer in record.layers}
    assert_same(reference, model, started.address, mode="exact")
    if row.predict:
        publish_predictors(started.address, model, everything)
        assert_same(reference, model, started.address, mode="predict")


def assert_same(reference: Any, model: str, address: str, mode: str) -> None:
    reference.generation_config.cache_implementation = None
    expected = reference.generate(IDS, attention_mask=torch.ones_like(IDS), **SETTINGS)
    with FlashClient(model, address=address, mode=mode) as client, torch.no_grad():
        logits = reference(IDS).logits
        assert (client.model(IDS).logits - logits).abs().max() <= TOLERANCE * logits.abs().max()
        assert client.generate(IDS.tolist(), **SETTINGS) == expected.tolist()
