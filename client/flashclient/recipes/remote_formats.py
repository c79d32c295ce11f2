"""Published formats whose code is remote, as data: which class of transformers computes the same, and how.

Each entry was worked out from the formulas of the published code, and tests/flashclient/recipes/test_remote_formats.py
compares it with a second implementation of them. Traps:

- ChatGLM 2 and 3 rotate the first half of each head, in interleaved pairs, as GLM does. rope_ratio scales the positions
  in ChatGLM2-6B-32K and the base in later models, so it is refused except in models with GLM-4's vocabulary.
- MiniCPM scales its embeddings, residual branches and logits. Granite has a multiplier for each.
- QWen counts both halves of its gated FFN in intermediate_size, and its gate is w2. Beyond seq_length it changes
  attention and rotary base, so its context ends there.
- ProSparse zeroes gate products up to a threshold (fatrelu). Bamboo and TurboSparse apply relu to gate and up (dReLU).
- TurboSparse stores trained predictors of neurons inside its FFNs. Its code skips what they do not predict, which loses
  quality; without them the FFN is exact.
- The first Falcons name the same configuration differently. Falcon-40B (RefinedWeb) has two norms for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flashclient.errors import ModelError
from flashclient.recipes.renaming import Omission, Rename, Target, rename, split_rows
from weightd_proto import weightd_pb2

Config = Mapping[str, Any]

PREDICTORS = "predictors of neurons: their use loses quality, and is for predict mode"
COMPUTED = "computed from config.json"
GLM4_VOCABULARY = 151552


@dataclass(frozen=True)
class RemoteFormat:
    """How a published configuration and its tensors become those of a class of transformers.

    Attributes:
        model_type: of transformers' configuration.
        model_class: of transformers.
        keys: transformers' names for keys of the configuration. Other keys keep their names.
        required: values that a key may have, because only for them the class computes the same. The first is the
            published code's default.
        computed: keys of transformers' configuration that follow from the published one.
        activation: what the FFNs compute, if transformers' configuration cannot say it.
        notes: what a user should know.
    """

    model_type: str
    model_class: str
    keys: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    computed: Callable[[Config], dict[str, Any]] = lambda config: {}
    renames: Callable[[Config], tuple[Rename, ...]] = lambda config: ()
    omissions: tuple[Omission, ...] = ()
    activation: Callable[[Config], weightd_pb2.Activation | None] = lambda config: None
    notes: Callable[[Config], tuple[str, ...]] = lambda config: ()


def number(config: Config, key: str, default: float | None = None) -> Any:
    """A positive number of the configuration. Raises ModelError if it is missing or anything else."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ModelError(f"config.json has {key} = {value!r}, expected a positive number")
    return value


# ChatGLM 2 and 3, and GLM-4 in its first format


def _chatglm_heads(config: Config) -> tuple[int, int, int]:
    """Query heads, key heads and their size."""
    heads = number(config, "num_attention_heads")
    keys = number(config, "multi_query_group_num", 1) if config.get("multi_query_attention") else heads
    return heads, keys, number(config, "kv_channels", number(config, "hidden_size") // heads)


def _chatglm_config(config: Config) -> dict[str, Any]:
    _, keys, head_dim = _chatglm_heads(config)
    ratio = number(config, "rope_ratio", 1)
    if ratio != 1 and config.get("padded_vocab_size") != GLM4_VOCABULARY:
        raise ModelError(
            f"config.json has rope_ratio = {ratio!r}, which scales positions in some models of this type and the "
            "rotary base in others: only 1 is known to be right"
        )
    return {
        "num_key_value_heads": keys,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": bool(config.get("add_qkv_bias", False)),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0 * ratio, "partial_rotary_factor": 0.5},
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": 2 if config.get("eos_token_id") is None else config["eos_token_id"],
        "pad_token_id": 0 if config.get("pad_token_id") is None else config["pad_token_id"],
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _chatglm_names(config: Config) -> tuple[Rename, ...]:
    heads, keys, head_dim = _chatglm_heads(config)
    theirs, ours = r"transformer\.encoder\.layers\.(\d+)", r"model.layers.\1"
    rows = {"q_proj": heads * head_dim, "k_proj": keys * head_dim, "v_proj": keys * head_dim}
    fused = split_rows({rf"{ours}.self_attn.{name}.\2": count for name, count in rows.items()})
    return (
        rename(r"transformer\.embedding\.word_embeddings\.weight", "model.embed_tokens.weight"),
        rename(rf"{theirs}\.(input_layernorm|post_attention_layernorm)\.weight", rf"{ours}.\2.weight"),
        rename(rf"{theirs}\.self_attention\.query_key_value\.(weight|bias)", *fused),
        rename(rf"{theirs}\.self_attention\.dense\.weight", rf"{ours}.self_attn.o_proj.weight"),
        rename(rf"{theirs}\.mlp\.dense_h_to_4h\.weight", rf"{ours}.mlp.gate_up_proj.weight"),
        rename(rf"{theirs}\.mlp\.dense_4h_to_h\.weight", rf"{ours}.mlp.down_proj.weight"),
        rename(r"transformer\.encoder\.final_layernorm\.weight", "model.norm.weight"),
        rename(r"transformer\.output_layer\.weight", "lm_head.weight"),
    )


_CHATGLM = RemoteFormat(
    "glm",
    "GlmForCausalLM",
    keys={
        "num_layers": "num_hidden_layers",
        "padded_vocab_size": "vocab_size",
        "ffn_hidden_size": "intermediate_size",
        "layernorm_epsilon": "rms_norm_eps",
        "seq_length": "max_position_embeddings",
    },
    required={
        "rmsnorm": (True,),
        "post_layer_norm": (True,),
        "apply_residual_connection_post_layernorm": (False,),
        "add_bias_linear": (False,),
        "fp32_residual_connection": (False,),
        "quantization_bit": (0, None),
        "pre_seq_len": (None,),
        "original_rope": (True,),
        "interleaved_qkv": (False,),
        "position_encoding_2d": (False,),  # true in the first ChatGLM-6B, which has other mathematics
    },
    computed=_chatglm_config,
    renames=_chatglm_names,
    omissions=(Omission(r"transformer\.rotary_pos_emb\.inv_freq", COMPUTED),),
)


# MiniCPM and MiniCPM-S


def _minicpm_config(config: Config) -> dict[str, Any]:
    hidden = number(config, "hidden_size")
    layers = number(config, "num_hidden_layers")
    return {
        "hidden_act": "relu" if config.get("hidden_act") == "fatrelu" else config.get("hidden_act", "silu"),
        "embedding_multiplier": float(number(config, "scale_emb", 1)),
        "residual_multiplier": number(config, "scale_depth", 1) / math.sqrt(layers),
        "logits_scaling": hidden / number(config, "dim_model_base", 1),
        "attention_multiplier": 1 / math.sqrt(hidden // number(config, "num_attention_heads")),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", True)),
    }


def _fatrelu(config: Config) -> weightd_pb2.Activation | None:
    if config.get("hidden_act") != "fatrelu":
        return None
    threshold = config.get("hidden_act_param", 0.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold >= 0:
        raise ModelError(f"config.json has hidden_act_param = {threshold!r}, expected fatrelu's threshold")
    return weightd_pb2.Activation(function="fatrelu", parameter=threshold)


_MINICPM = RemoteFormat(
    "granite",
    "GraniteForCausalLM",
    required={
        "rope_scaling": (None,),
        "num_experts": (0, None),
        "sparse_config": (None,),
        "pretraining_tp": (1,),
        "attention_bias": (False,),
    },
    computed=_minicpm_config,
    activation=_fatrelu,
)

_SPARSE_LLAMA = RemoteFormat(
    "llama",
    "LlamaForCausalLM",
    required={"pretraining_tp": (1,)},
    computed=lambda config: {"hidden_act": "relu"} if config.get("hidden_act") == "fatrelu" else {},
    activation=_fatrelu,
)


# Bamboo, TurboSparse-Mistral and TurboSparse-Mixtral


def _relu_on_both(config: Config) -> weightd_pb2.Activation:
    return weightd_pb2.Activation(function="gated_relu")


_BAMBOO = RemoteFormat(
    "mistral",
    "MistralForCausalLM",
    required={"hidden_act": ("relu",)},
    omissions=(Omission(r"model\.layers\.\d+\.mlp\.predictor\..+", PREDICTORS),),
    activation=_relu_on_both,
)

_TURBOSPARSE_MIXTRAL = RemoteFormat(
    "mixtral",
    "MixtralForCausalLM",
    required={"hidden_act": ("relu",)},
    omissions=(Omission(r"model\.layers\.\d+\.block_sparse_moe\.(experts\.\d+\.)?predictor\..+", PREDICTORS),),
    activation=_relu_on_both,
)


# QWen, the first one


def _qwen_config(config: Config) -> dict[str, Any]:
    heads = number(config, "num_attention_heads")
    head_dim = number(config, "kv_channels", 128)
    if heads * head_dim != number(config, "hidden_size"):
        raise ModelError(f"config.json has kv_channels = {head_dim!r}, which is not hidden_size / num_attention_heads")
    return {
        "intermediate_size": number(config, "intermediate_size") // 2,
        "num_key_value_heads": heads,
        "hidden_act": "silu",
        "max_position_embeddings": number(config, "seq_length"),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(number(config, "rotary_emb_base", 10000))},
        "use_sliding_window": False,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _qwen_names(config: Config) -> tuple[Rename, ...]:
    size = number(config, "hidden_size")
    theirs, ours = r"transformer\.h\.(\d+)", r"model.layers.\1"
    fused = split_rows({rf"{ours}.self_attn.{name}_proj.\2": size for name in "qkv"})
    return (
        rename(r"transformer\.wte\.weight", "model.embed_tokens.weight"),
        rename(rf"{theirs}\.ln_1\.weight", rf"{ours}.input_layernorm.weight"),
        rename(rf"{theirs}\.ln_2\.weight", rf"{ours}.post_attention_layernorm.weight"),
        rename(rf"{theirs}\.attn\.c_attn\.(weight|bias)", *fused),
        rename(rf"{theirs}\.attn\.c_proj\.weight", rf"{ours}.self_attn.o_proj.weight"),
        rename(rf"{theirs}\.mlp\.w2\.weight", rf"{ours}.mlp.gate_proj.weight"),
        rename(rf"{theirs}\.mlp\.w1\.weight", rf"{ours}.mlp.up_proj.weight"),
        rename(rf"{theirs}\.mlp\.c_proj\.weight", rf"{ours}.mlp.down_proj.weight"),
        rename(r"transformer\.ln_f\.weight", "model.norm.weight"),
    )


def _qwen_notes(config: Config) -> tuple[str, ...]:
    if not (config.get("use_dynamic_ntk", True) or config.get("use_logn_attn", True)):
        return ()
    return (
        f"the context ends at {number(config, 'seq_length')} tokens: beyond, the published code changes its rotary "
        "base and attention",
    )


_QWEN = RemoteFormat(
    "qwen2",
    "Qwen2ForCausalLM",
    keys={"layer_norm_epsilon": "rms_norm_eps"},
    required={"rotary_pct": (1.0, 1), "no_bias": (True,), "scale_attn_weights": (True,)},
    computed=_qwen_config,
    renames=_qwen_names,
    omissions=(
        Omission(r"transformer\.rotary_emb\.inv_freq", COMPUTED),
        Omission(r"transformer\.visual\..+", "vision tower: only the text part runs"),
    ),
    notes=_qwen_notes,
)


# InternLM 1 and 2, and Baichuan-7B: Llama with fused projections


def _internlm2_names(config: Config) -> tuple[Rename, ...]:
    """wqkv has the rows of each key head together: those of its queries, of the key and of the value."""
    heads = number(config, "num_attention_heads")
    keys = number(config, "num_key_value_heads", heads)
    size = number(config, "hidden_size") // heads
    group = (heads // keys + 2) * size
    begins = [index * group for index in range(keys)]
    theirs, ours = r"model\.layers\.(\d+)", r"model.layers.\1"
    return (
        rename(r"model\.tok_embeddings\.weight", "model.embed_tokens.weight"),
        rename(r"output\.weight", "lm_head.weight"),
        rename(
            rf"{theirs}\.attention\.wqkv\.(weight|bias)",
            Target(rf"{ours}.self_attn.q_proj.\2", tuple((at, at + group - 2 * size) for at in begins)),
            Target(rf"{ours}.self_attn.k_proj.\2", tuple((at + group - 2 * size, at + group - size) for at in begins)),
            Target(rf"{ours}.self_attn.v_proj.\2", tuple((at + group - size, at + group) for at in begins)),
        ),
        rename(rf"{theirs}\.attention\.wo\.(weight|bias)", rf"{ours}.self_attn.o_proj.\2"),
        rename(rf"{theirs}\.feed_forward\.w1\.weight", rf"{ours}.mlp.gate_proj.weight"),
        rename(rf"{theirs}\.feed_forward\.w3\.weight", rf"{ours}.mlp.up_proj.weight"),
        rename(rf"{theirs}\.feed_forward\.w2\.weight", rf"{ours}.mlp.down_proj.weight"),
        rename(rf"{theirs}\.attention_norm\.weight", rf"{ours}.input_layernorm.weight"),
        rename(rf"{theirs}\.ffn_norm\.weight", rf"{ours}.post_attention_layernorm.weight"),
    )


def _baichuan_names(config: Config) -> tuple[Rename, ...]:
    size = number(config, "hidden_size")
    fused = split_rows({rf"model.layers.\1.self_attn.{name}_proj.weight": size for name in "qkv"})
    return (rename(r"model\.layers\.(\d+)\.self_attn\.W_pack\.weight", *fused),)


def _baichuan_config(config: Config) -> dict[str, Any]:
    # Baichuan 2 (vocabulary 125696) normalises the head's rows. The models of 13 B (40 layers) use ALiBi.
    if number(config, "vocab_size") != 64000 or number(config, "num_hidden_layers") >= 40:
        raise ModelError(
            "of the Baichuan models only Baichuan-7B is known: the others use ALiBi or normalise their head, and no "
            "class of transformers does"
        )
    return {}


_INTERNLM = RemoteFormat(
    "llama",
    "LlamaForCausalLM",
    keys={"bias": "attention_bias"},
    required={"rotary": ({"base": 10000, "type": "origin"}, None), "rope_scaling": (None,)},
    omissions=(Omission(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", COMPUTED),),
)
_INTERNLM2 = RemoteFormat(
    "llama",
    "LlamaForCausalLM",
    keys={"bias": "attention_bias"},
    renames=_internlm2_names,
)
_BAICHUAN = RemoteFormat(
    "llama",
    "LlamaForCausalLM",
    computed=_baichuan_config,
    renames=_baichuan_names,
    omissions=(Omission(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", COMPUTED),),
)


# Kimi K2 is DeepSeek-V3 under another name

_KIMI_K2 = RemoteFormat("deepseek_v3", "DeepseekV3ForCausalLM")
_MIMO = RemoteFormat("qwen2", "Qwen2ForCausalLM")  # and layers that predict further tokens, which are left out


# Falcon as it was first published

_FALCON_KEYS = {
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_head_kv": "num_kv_heads",
    "n_embed": "hidden_size",
}
_FALCON_7B = RemoteFormat(
    "falcon",
    "FalconForCausalLM",
    keys=_FALCON_KEYS,
    computed=lambda config: {"new_decoder_architecture": False},
)
_FALCON_40B = RemoteFormat(
    "falcon",
    "FalconForCausalLM",
    keys=_FALCON_KEYS,
    computed=lambda config: {"new_decoder_architecture": True},
)

# By config.json's model_type. MiniCPM's configurations have none, so their architecture stands for it.
REMOTE_FORMATS: dict[str, RemoteFormat] = {
    "chatglm": _CHATGLM,
    "minicpm": _MINICPM,
    "sparsellama": _SPARSE_LLAMA,
    "bamboo": _BAMBOO,
    "turbosparsemixtral": _TURBOSPARSE_MIXTRAL,
    "qwen": _QWEN,
    "internlm": _INTERNLM,
    "internlm2": _INTERNLM2,
    "baichuan": _BAICHUAN,
    "kimi_k2": _KIMI_K2,
    "mimo": _MIMO,
    "RefinedWebModel": _FALCON_7B,
    "RefinedWeb": _FALCON_40B,
}
ARCHITECTURES = {"MiniCPMForCausalLM": "minicpm", "ChatGLMModel": "chatglm", "QWenLMHeadModel": "qwen"}
