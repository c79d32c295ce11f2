"""What each architecture of GGUF files is to transformers, as data.

The names of tensors are not here: gguf's own table maps them (flashclient.recipes.gguf_names). llama.cpp's converter
(convert_hf_to_gguf.py) has changed some tensors' values or shapes, and the import undoes that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from weightd.disk.tensors import SourceTensor, Undo
from weightd.errors import CheckpointError

RMS_NORM = "attention.layer_norm_rms_epsilon"
LAYER_NORM = "attention.layer_norm_epsilon"
SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
}


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        model_type, model_class: of transformers.
        names: of fields that the configuration calls by other names than most; None: it has no such field.
        sizes: further fields, by key.
        constants: fields that no key says.
        norm: the key and the field of the norms' epsilon.
        rope: whether positions are rotary, partial: whether only a part of each head is rotated.
        head_dim: whether heads may be wider or narrower than their share of the hidden size.
        windows: how the field of the sliding window is used: `layers` of some layers, `all`; empty: no window.
        local_theta: the base of the rotary embedding of layers with a window, which is not scaled, where the header has
            none; 0: that of the other layers; None: these layers have none of their own.
        caps: fields of softcaps, by key.
        scales: fields of factors, by key.
        permuted: the rows of Q and K are in the order of llama.cpp's rotary embedding.
        norms_plus_one: one was added to the weights of norms.
    """

    model_type: str
    model_class: str
    names: Mapping[str, str | None] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    norm: tuple[str, str] = (RMS_NORM, "rms_norm_eps")
    rope: bool = True
    partial: bool = False
    head_dim: bool = False
    windows: str = ""
    local_theta: float | None = None
    caps: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    permuted: bool = False
    norms_plus_one: bool = False


_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
_EXPERTS = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_MOE = {**_EXPERTS, "moe_intermediate_size": "expert_feed_forward_length"}
_SHARED = {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}
_FINAL_CAP = {"final_logit_softcapping": "final_logit_softcapping"}
_GPT2 = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": None,
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}

ARCHITECTURES: dict[str, Architecture] = {
    "arcee": Architecture("arcee", "ArceeForCausalLM", head_dim=True, constants={"hidden_act": "relu2"}, permuted=True),
    "bloom": Architecture(
        "bloom", "BloomForCausalLM", norm=(LAYER_NORM, "layer_norm_epsilon"), rope=False,
        names={"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "num_key_value_heads": None,
               "intermediate_size": None, "max_position_embeddings": None},
    ),
    "ernie4_5": Architecture("ernie4_5", "Ernie4_5ForCausalLM", head_dim=True, constants=_SILU),
    "falcon": Architecture(
        "falcon", "FalconForCausalLM", norm=(LAYER_NORM, "layer_norm_epsilon"),
        names={"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"},
        constants={"bias": False, "alibi": False, "parallel_attn": True},
    ),
    "gemma": Architecture("gemma", "GemmaForCausalLM", head_dim=True, constants=_GELU, norms_plus_one=True),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", head_dim=True, windows="layers", constants=_GELU, norms_plus_one=True,
        caps={**_FINAL_CAP, "attn_logit_softcapping": "attn_logit_softcapping"},
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", head_dim=True, windows="layers", local_theta=1e4, constants=_GELU,
        norms_plus_one=True, caps=_FINAL_CAP,
    ),
    "gpt2": Architecture("gpt2", "GPT2LMHeadModel", names=_GPT2, norm=(LAYER_NORM, "layer_norm_epsilon"), rope=False),
    "gpt-oss": Architecture(
        "gpt_oss", "GptOssForCausalLM", head_dim=True, windows="layers",
        names={"intermediate_size": None},
        sizes={"intermediate_size": "expert_feed_forward_length", "num_local_experts": "expert_count",
               "num_experts_per_tok": "expert_used_count"},
    ),
    "granite": Architecture(
        "granite", "GraniteForCausalLM", constants=_SILU, permuted=True,
        scales={"embedding_multiplier": "embedding_scale", "attention_multiplier": "attention.scale",
                "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale"},
    ),
    "lfm2": Architecture(
        "lfm2", "Lfm2ForCausalLM", norm=(RMS_NORM, "norm_eps"), sizes={"conv_L_cache": "shortconv.l_cache"},
        constants={"block_auto_adjust_ff_dim": False},
    ),
    "llama": Architecture("llama", "LlamaForCausalLM", head_dim=True, constants=_SILU, permuted=True),
    # llama files with experts
    "mixtral": Architecture(
        "mixtral", "MixtralForCausalLM", head_dim=True, permuted=True, constants=_SILU,
        sizes={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
    ),
    "minimax-m2": Architecture(
        "minimax_m2", "MiniMaxM2ForCausalLM", head_dim=True, partial=True, constants=_SILU,
        sizes={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
    ),
    "nemotron": Architecture(
        "nemotron", "NemotronForCausalLM", norm=(LAYER_NORM, "norm_eps"), head_dim=True, partial=True,
        constants={"hidden_act": "relu2"}, norms_plus_one=True,
    ),
    "olmoe": Architecture(
        "olmoe", "OlmoeForCausalLM", sizes=_EXPERTS, constants=_SILU | {"norm_topk_prob": False}
    ),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", constants=_SILU),
    # olmo2 files with sliding windows
    "olmo3": Architecture("olmo3", "Olmo3ForCausalLM", windows="layers", local_theta=0.0, constants=_SILU),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", partial=True, windows="all", constants=_SILU),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", head_dim=True, constants=_SILU),
    "qwen2moe": Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", sizes={**_MOE, **_SHARED}, constants=_SILU | {"norm_topk_prob": False}
    ),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", head_dim=True, constants=_SILU),
    "qwen3moe": Architecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", head_dim=True, sizes=_MOE, constants=_SILU | {"norm_topk_prob": True}
    ),
    "seed_oss": Architecture("seed_oss", "SeedOssForCausalLM", head_dim=True, constants=_SILU),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", constants=_SILU, permuted=True),
    "stablelm": Architecture(
        "stablelm", "StableLmForCausalLM", norm=(LAYER_NORM, "layer_norm_eps"), partial=True, constants=_SILU
    ),
    "starcoder2": Architecture("starcoder2", "Starcoder2ForCausalLM", norm=(LAYER_NORM, "norm_epsilon"), windows="all"),
}  # fmt: skip
# Architectures that another class runs where they have this key: files with experts, and with sliding windows.
VARIANTS = {"llama": ("expert_count", "mixtral"), "olmo2": ("attention.sliding_window", "olmo3")}


def architecture_of(name: str, has: Callable[[str], bool]) -> Architecture:
    """`has`: whether the header has a number other than 0 for a key. CheckpointError for an unknown one lists the
    known ones."""
    variants = {variant for _, variant in VARIANTS.values()}
    if name not in ARCHITECTURES or name in variants:
        known = ", ".join(sorted(ARCHITECTURES.keys() - variants))
        raise CheckpointError(
            f"unknown GGUF architecture {name!r}: known are {known}; models of others are imported from their Hugging "
            "Face folder"
        )
    key, variant = VARIANTS.get(name, ("", name))
    return ARCHITECTURES[variant if key and has(key) else name]


# A dimension of one element that the converter has left out, by the tensor's name.
_SQUEEZED = (
    (re.compile(r"blk\.\d+\.ffn_gate_inp_shexp\.weight"), 0),
    (re.compile(r"blk\.\d+\.shortconv\.conv\.weight"), 1),
)
_ROTATED = re.compile(r"blk\.\d+\.attn_(q|k)\.(weight|bias)")


def restored(
    tensors: Mapping[str, SourceTensor], architecture: Architecture, heads: int, key_heads: int
) -> dict[str, SourceTensor]:
    """The tensors in transformers' shapes, with the changes to undo in their values."""
    return {name: _restored(tensor, architecture, heads, key_heads) for name, tensor in tensors.items()}


def _restored(tensor: SourceTensor, architecture: Architecture, heads: int, key_heads: int) -> SourceTensor:
    rotated = _ROTATED.fullmatch(tensor.name)
    if architecture.permuted and rotated is not None:
        return replace(tensor, undo=Undo(heads if rotated[1] == "q" else key_heads))
    if architecture.norms_plus_one and tensor.name.endswith("norm.weight"):
        return replace(tensor, undo=Undo())
    for pattern, dim in _SQUEEZED:
        if pattern.fullmatch(tensor.name) and len(tensor.shape) == dim + 1:
            return replace(tensor, shape=(*tensor.shape[:dim], 1, *tensor.shape[dim:]))
    return tensor
