"""Formats with remote code: transformers' class, on the mapped tensors, computes what the published formulas say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from published_checkpoints import (
    BAMBOO,
    CAUSAL,
    CHATGLM,
    LLAMA,
    MINICPM,
    QWEN,
    SPARSE_LLAMA,
    TURBOSPARSE_MIXTRAL,
    State,
    Tensor,
    chatglm_state,
    llama,
    qwen_state,
    reference_of,
    state_of,
    turbosparse_mixtral_state,
)
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import AutoConfig

from flashclient.errors import ModelError
from flashclient.recipes.published import parse_activation, published
from flashclient.recipes.reference import amend
from flashclient.recipes.remote_formats import PREDICTORS
from flashclient.tensors.names import FURTHER_TOKENS
from weightd_proto import weightd_pb2

MISTRAL_CLASS: Any = transformers.MistralForCausalLM
IDS = torch.arange(3, 27).reshape(2, 12)


def logits_of(config: dict[str, Any], state: State, folder: Path) -> Tensor:
    with torch.no_grad():
        logits: Tensor = reference_of(config, state, folder)(input_ids=IDS).logits
    assert logits.std() > 1e-3
    return logits


def norm(values: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def angles(positions: int, dim: int, base: float = 10000.0) -> Tensor:
    """[positions, dim / 2]."""
    return torch.arange(positions)[:, None] * base ** (-torch.arange(0, dim, 2) / dim)


def rotate_pairs(heads: Tensor, dim: int) -> Tensor:
    """Rotates the first `dim` values of each head [batch, heads, positions, size] in neighbouring pairs."""
    pairs = torch.view_as_complex(heads[..., :dim].float().unflatten(-1, (-1, 2)).contiguous())
    angle = angles(heads.shape[-2], dim)
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    return torch.cat((turned, heads[..., dim:]), dim=-1)


def rotate_halves(heads: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    angle = angles(heads.shape[-2], heads.shape[-1])
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention; key heads serve neighbouring query heads. [batch, positions, heads * size]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


def heads_of(values: Tensor, size: int) -> Tensor:
    return values.unflatten(-1, (-1, size)).transpose(1, 2)


# ChatGLM


def chatglm_logits(state: State) -> Tensor:
    hidden = state["transformer.embedding.word_embeddings.weight"][IDS]
    for index in range(2):
        layer = {name.split(f".{index}.", 1)[1]: value for name, value in state.items() if f"layers.{index}." in name}
        normed = norm(hidden, layer["input_layernorm.weight"], 1e-5)
        fused = normed @ layer["self_attention.query_key_value.weight"].T + layer["self_attention.query_key_value.bias"]
        query, key, value = (heads_of(part, 8) for part in fused.split((32, 16, 16), dim=-1))
        attended = attend(rotate_pairs(query, 4), rotate_pairs(key, 4), value)
        hidden = hidden + attended @ layer["self_attention.dense.weight"].T
        normed = norm(hidden, layer["post_attention_layernorm.weight"], 1e-5)
        gate, up = (normed @ layer["mlp.dense_h_to_4h.weight"].T).chunk(2, dim=-1)
        hidden = hidden + (silu(gate) * up) @ layer["mlp.dense_4h_to_h.weight"].T
    return (
        norm(hidden, state["transformer.encoder.final_layernorm.weight"], 1e-5)
        @ state["transformer.output_layer.weight"].T
    )


def test_chatglm_runs_as_glm(tmp_path: Path) -> None:
    state = chatglm_state()
    torch.testing.assert_close(logits_of(CHATGLM, state, tmp_path), chatglm_logits(state), rtol=1e-4, atol=1e-4)


def test_glm_4_scales_its_rotary_base_but_other_models_may_scale_positions() -> None:
    glm4 = published(CHATGLM | {"rope_ratio": 500, "padded_vocab_size": 151552}).config
    assert glm4["rope_parameters"]["rope_theta"] == 5e6
    with pytest.raises(ModelError, match="rope_ratio = 50, which scales positions in some"):
        published(CHATGLM | {"rope_ratio": 50})


def test_qkv_of_other_rows_than_its_heads_is_refused() -> None:
    name = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
    with pytest.raises(
        ModelError, match=r"query_key_value\.weight has shape \[96, 32\], but by config\.json it has 64"
    ):
        published(CHATGLM).tensors({name: (96, 32)})


# MiniCPM, ProSparse


class FatReluOfOneHundredth(torch.nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values * (values > 0.01)


def with_fatrelu(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp.act_fn = FatReluOfOneHundredth()
    return model


@torch.no_grad()
def test_minicpm_runs_as_granite_with_its_scales(tmp_path: Path) -> None:
    reference = with_fatrelu(llama(tied=True))
    scale = 1.4 / math.sqrt(2)
    reference.model.embed_tokens.register_forward_hook(lambda _m, _i, output: output * 12)
    for layer in reference.model.layers:
        layer.self_attn.register_forward_hook(lambda _m, _i, output: (output[0] * scale, *output[1:]))
        layer.mlp.register_forward_hook(lambda _m, _i, output: output * scale)
    reference.lm_head.register_forward_pre_hook(lambda _m, inputs: (inputs[0] / (32 / 8),))
    expected = reference(input_ids=IDS).logits
    torch.testing.assert_close(logits_of(MINICPM, state_of(reference), tmp_path), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"sparse_config": {}}, "sparse_config"),
        ({"scale_emb": 0}, "scale_emb = 0, expected a positive number"),
        ({"hidden_act_param": -1}, "hidden_act_param = -1"),
    ],
)
def test_minicpm_whose_values_granite_lacks_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        published(MINICPM | change)


@torch.no_grad()
def test_prosparse_runs_as_llama_with_fatrelu(tmp_path: Path) -> None:
    reference = with_fatrelu(llama(tied=False))
    found = logits_of(SPARSE_LLAMA, state_of(reference), tmp_path)
    torch.testing.assert_close(found, reference(input_ids=IDS).logits)


# Relu on gate and up


@torch.no_grad()
def test_bamboo_runs_as_mistral_with_relu_on_both(tmp_path: Path) -> None:
    """TurboSparse-Mistral also has predictors, which are left out."""
    reference = MISTRAL_CLASS._from_config(AutoConfig.for_model("mistral", **LLAMA)).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for layer in reference.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(torch.relu(mlp.gate_proj(x)) * torch.relu(mlp.up_proj(x)))
    state = state_of(reference)
    predictors = {f"model.layers.0.mlp.predictor.fc{n}.weight": torch.ones(4, 4) for n in (1, 2)}
    found = logits_of(BAMBOO, state | predictors, tmp_path)
    torch.testing.assert_close(found, reference(input_ids=IDS).logits)
    _, (left,) = published(BAMBOO).tensors(dict.fromkeys(predictors, (4, 4)))
    assert (left.reason, set(left.tensors)) == (PREDICTORS, set(predictors))


@torch.no_grad()
def test_turbosparse_mixtral_runs_as_mixtral_with_relu_on_both(tmp_path: Path) -> None:
    state = turbosparse_mixtral_state()

    def mixture(index: int, x: Tensor) -> Tensor:
        moe = f"model.layers.{index}.block_sparse_moe"
        chances, picks = (x @ state[f"{moe}.gate.weight"].T).softmax(-1).topk(2)
        result = torch.zeros_like(x)
        for place in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
            b, t = place
            for chance, expert in zip(chances[b, t] / chances[b, t].sum(), picks[b, t].tolist(), strict=True):
                w1, w2, w3 = (state[f"{moe}.experts.{expert}.{name}.weight"] for name in ("w1", "w2", "w3"))
                result[b, t] += chance * (w2 @ (torch.relu(w1 @ x[b, t]) * torch.relu(w3 @ x[b, t])))
        return result

    reference = llama(tied=False)
    for index, layer in enumerate(reference.model.layers):
        layer.mlp.forward = lambda x, index=index: mixture(index, x)
    expected = reference(input_ids=IDS).logits
    torch.testing.assert_close(logits_of(TURBOSPARSE_MIXTRAL, state, tmp_path), expected, rtol=1e-4, atol=1e-4)


# QWen


def test_qwen_runs_as_qwen2(tmp_path: Path) -> None:
    state = qwen_state()
    hidden = state["transformer.wte.weight"][IDS]
    for index in range(2):
        layer = {name.split(f".{index}.", 1)[1]: value for name, value in state.items() if f"h.{index}." in name}
        fused = norm(hidden, layer["ln_1.weight"], 1e-6) @ layer["attn.c_attn.weight"].T + layer["attn.c_attn.bias"]
        query, key, value = (heads_of(part, 8) for part in fused.chunk(3, dim=-1))
        attended = attend(rotate_halves(query), rotate_halves(key), value)
        hidden = hidden + attended @ layer["attn.c_proj.weight"].T
        normed = norm(hidden, layer["ln_2.weight"], 1e-6)
        inner = (normed @ layer["mlp.w1.weight"].T) * silu(normed @ layer["mlp.w2.weight"].T)
        hidden = hidden + inner @ layer["mlp.c_proj.weight"].T
    expected = norm(hidden, state["transformer.ln_f.weight"], 1e-6) @ state["lm_head.weight"].T
    torch.testing.assert_close(logits_of(QWEN, state, tmp_path), expected, rtol=1e-4, atol=1e-4)
    assert published(QWEN).config["max_position_embeddings"] == 64
    assert "context ends at 64 tokens" in published(QWEN).notes[0]


# InternLM, Baichuan, Falcon


@torch.no_grad()
def test_internlm2_runs_as_llama(tmp_path: Path) -> None:
    reference = llama(tied=False)
    state = state_of(reference)
    state["model.tok_embeddings.weight"] = state.pop("model.embed_tokens.weight")
    state["output.weight"] = state.pop("lm_head.weight")
    for index in range(2):
        layer = f"model.layers.{index}"
        query, key, value = (state.pop(f"{layer}.self_attn.{name}_proj.weight") for name in "qkv")
        groups = [query.reshape(2, 2, 8, 32), key.reshape(2, 1, 8, 32), value.reshape(2, 1, 8, 32)]
        state[f"{layer}.attention.wqkv.weight"] = torch.cat(groups, dim=1).reshape(64, 32)
        for theirs, ours in {
            "attention.wo": "self_attn.o_proj",
            "feed_forward.w1": "mlp.gate_proj",
            "feed_forward.w3": "mlp.up_proj",
            "feed_forward.w2": "mlp.down_proj",
            "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }.items():
            state[f"{layer}.{theirs}.weight"] = state.pop(f"{layer}.{ours}.weight")
    config = LLAMA | {"model_type": "internlm2", "bias": False, "hidden_act": "silu", "tie_word_embeddings": False}
    torch.testing.assert_close(logits_of(config, state, tmp_path), reference(input_ids=IDS).logits)


@torch.no_grad()
def test_internlm_runs_as_llama_with_biases(tmp_path: Path) -> None:
    reference = llama(tied=False, attention_bias=True)
    config = LLAMA | {"model_type": "internlm", "bias": True, "hidden_act": "silu", "tie_word_embeddings": False}
    torch.testing.assert_close(logits_of(config, state_of(reference), tmp_path), reference(input_ids=IDS).logits)


@torch.no_grad()
def test_baichuan_7b_runs_as_llama(tmp_path: Path) -> None:
    reference = llama(tied=False, num_key_value_heads=4, vocab_size=64000)
    state = state_of(reference)
    for index in range(2):
        layer = f"model.layers.{index}.self_attn"
        state[f"{layer}.W_pack.weight"] = torch.cat([state.pop(f"{layer}.{name}_proj.weight") for name in "qkv"])
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    config |= {"model_type": "baichuan", "hidden_act": "silu", "vocab_size": 64000, "tie_word_embeddings": False}
    torch.testing.assert_close(logits_of(config, state, tmp_path), reference(input_ids=IDS).logits)
    with pytest.raises(ModelError, match="only Baichuan-7B is known"):
        published(config | {"vocab_size": 125696})


def test_kimi_k2_is_deepseek_v3() -> None:
    found = published({"model_type": "kimi_k2", "auto_map": {"AutoModel": "x.Y"}, "n_routed_experts": 384})
    assert found.config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert AutoConfig.for_model(**found.config).n_routed_experts == 384


@torch.no_grad()
def test_mimo_is_qwen2_without_the_layers_that_predict_further_tokens(tmp_path: Path) -> None:
    config = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": False}
    reference: Any = CAUSAL.from_config(AutoConfig.for_model(**config))
    state = state_of(reference)
    of_mimo = config | {"model_type": "mimo", "num_nextn_predict_layers": 1, "attention_bias": True}
    torch.testing.assert_close(logits_of(of_mimo, state, tmp_path), reference.eval()(input_ids=IDS).logits)
    assert FURTHER_TOKENS.search("model.mtp_layers.0.input_proj.weight")


@pytest.mark.parametrize("model_type", ["RefinedWebModel", "RefinedWeb"])
def test_first_falcons_have_their_sizes_under_other_names(model_type: str) -> None:
    old = {"n_head": 4, "n_layer": 2, "hidden_size": 32, "multi_query": True, "parallel_attn": True, "vocab_size": 96}
    config = published({"model_type": model_type, "n_head_kv": 2} | old).config
    model = CAUSAL.from_config(AutoConfig.for_model(**config))
    heads = {"RefinedWebModel": 4 + 2, "RefinedWeb": 4 + 2 * 2}[model_type]
    assert model.transformer.h[1].self_attention.query_key_value.out_features == heads * 8
    assert hasattr(model.transformer.h[0], "ln_attn") == (model_type == "RefinedWeb")


# Activations


@torch.no_grad()
def test_activation_that_the_user_names_replaces_that_of_the_configuration() -> None:
    """SparseQwen2 says silu and computes relu of gate and up."""
    config = LLAMA | {"model_type": "qwen2", "hidden_act": "silu"}
    found = published(config, "gated_relu")
    assert found.activation == weightd_pb2.Activation(function="gated_relu")
    assert published(config).activation is None
    reference = llama(tied=False)
    mlp = reference.model.layers[0].mlp
    x = torch.randn(3, 32)
    expected = mlp.down_proj(torch.relu(mlp.gate_proj(x)) * torch.relu(mlp.up_proj(x)))
    amend(reference, weightd_pb2.Activation(function="gated_relu"))
    torch.testing.assert_close(mlp(x), expected)


def test_activations_with_and_without_a_number() -> None:
    assert parse_activation("fatrelu:0.01").parameter == pytest.approx(0.01)
    for text in ("unheard_of", "fatrelu", "relu:1", "fatrelu:x", "fatrelu:-1", ""):
        with pytest.raises(ModelError, match="unknown activation"):
            parse_activation(text)


def test_model_without_an_activation_module_cannot_be_amended() -> None:
    with pytest.raises(ModelError, match="Linear has no activation that relu could replace"):
        amend(torch.nn.Linear(2, 2), weightd_pb2.Activation(function="relu"))
