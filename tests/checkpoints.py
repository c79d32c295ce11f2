"""Tiny checkpoints with random weights, in every format that weightd imports, and the models behind them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

FAMILIES = ("opt", "llama", "mistral", "qwen2", "gemma3")
GGUF_FAMILIES = ("llama", "qwen2", "gemma3")
VOCABULARY = 320  # bytes, then a few specials and words
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _common(hidden: int, layers: int, neurons: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | ({"intermediate_size": neurons, "num_key_value_heads": 2} if neurons else {})


def make_config(family: str, layers: int = 2, hidden: int = 64, neurons: int = 176, **changes: Any) -> PreTrainedConfig:
    """A transformers configuration; `changes` override its fields."""
    common = _common(hidden, layers, neurons)
    if family == "opt":
        options = _common(hidden, layers, 0) | {"ffn_dim": neurons, "word_embed_proj_dim": hidden}
        return OPTConfig(**(options | changes))
    if family == "gemma3":
        options = common | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
        return Gemma3TextConfig(**(options | changes))
    kinds = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
    config: PreTrainedConfig = kinds[family](**(common | changes))
    return config


def make_model(config: PreTrainedConfig, dtype: str = "float32", seed: int = 0) -> PreTrainedModel:
    """A model whose every parameter is random, norms and biases too."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") and "gemma" not in config.model_type else 0.0
            parameter.copy_(centre + torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else 0.1))
    model.to(DTYPES[dtype])  # type: ignore[arg-type]
    model.eval()  # type: ignore[no-untyped-call]
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, one token per byte and one for `he`; <pad> 0, <s> 1, </s> 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet, "he"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def make_checkpoint(
    family: str,
    folder: Path,
    *,
    dtype: str = "float32",
    layers: int = 2,
    hidden: int = 64,
    neurons: int = 176,
    format: str = "safetensors",
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Writes a checkpoint into `folder` (made if need be) and returns what to import: the folder, or the .gguf file.

    `format`: safetensors, safetensors-sharded, bin, bin-sharded or gguf (F32, F16 or BF16 by `dtype`; norms F32).
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(make_config(family, layers, hidden, neurons, **changes), dtype, seed)
    if format == "gguf":
        return write_gguf(model, folder / "model.gguf")
    make_tokenizer().save_pretrained(folder)
    if format.startswith("safetensors"):
        model.save_pretrained(folder, max_shard_size="100KB" if format.endswith("sharded") else "5GB")
        for file in folder.glob("*.safetensors"):
            file.chmod(0o644)  # as downloads are; safetensors writes them for their owner alone
        return folder
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    write_torch(stored_tensors(model), folder, shards=3 if format.endswith("sharded") else 1)
    return folder


def stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state_dict without a tied head."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return state


def write_torch(state: Mapping[str, torch.Tensor], folder: Path, shards: int = 1) -> None:
    """pytorch_model.bin, or shards with an index."""
    if shards == 1:
        torch.save(dict(state), folder / "pytorch_model.bin")
        return
    names = list(state)
    weight_map = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: state[name] for name in names[shard::shards]}, folder / file)
        weight_map.update(dict.fromkeys(names[shard::shards], file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


# GGUF, as llama.cpp's convert_hf_to_gguf.py writes it

_GGUF_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GGUF_NORMS = {
    "llama": {"post_attention_layernorm": "ffn_norm"},
    "qwen2": {"post_attention_layernorm": "ffn_norm"},
    "gemma3": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}


def _gguf_name(architecture: str, name: str) -> str:
    module, kind = name.rsplit(".", 1)
    names = _GGUF_MODULES | _GGUF_NORMS[architecture]
    if module.startswith("model.layers."):
        _, _, layer, within = module.split(".", 3)
        return f"blk.{layer}.{names[within]}.{kind}"
    return f"{names[module]}.{kind}"


def _interleave_halves(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's permute(): the rows of a head's two rotary halves, alternating."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def _gguf_values(architecture: str, name: str, tensor: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    values = tensor.float()
    if architecture == "llama" and ".q_proj." in name:
        return _interleave_halves(values, config.num_attention_heads)
    if architecture == "llama" and ".k_proj." in name:
        return _interleave_halves(values, config.num_key_value_heads)
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return values + 1
    return values


def _choose_type(
    quantise: Callable[[str], gguf.GGMLQuantizationType] | None, name: str, tensor: torch.Tensor
) -> gguf.GGMLQuantizationType:
    if tensor.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    if quantise is not None:
        return quantise(name)
    plain = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return gguf.GGMLQuantizationType[plain[tensor.dtype]]


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    quantise: Callable[[str], gguf.GGMLQuantizationType] | None = None,
    add: Callable[[gguf.GGUFWriter], Any] | None = None,
) -> Path:
    """The model as a GGUF file; `quantise` gives the type of each matrix by its GGUF name, default its own dtype, and
    `add` adds to the header, or changes it."""
    config = model.config
    architecture = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
    else:
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    _add_vocabulary(writer)
    for name, tensor in stored_tensors(model).items():
        gguf_name = _gguf_name(architecture, name)
        values = np.ascontiguousarray(_gguf_values(architecture, name, tensor, config).numpy())
        kind = _choose_type(quantise, gguf_name, tensor)
        writer.add_tensor(gguf_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    if add is not None:
        add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """The tokens of make_tokenizer, filled up to VOCABULARY."""
    tokenizer = make_tokenizer()
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    tokens += [f"<unused{index}>" for index in range(VOCABULARY - len(tokens))]
    control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token.startswith("<") and len(token) > 1 else normal for token in tokens])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
