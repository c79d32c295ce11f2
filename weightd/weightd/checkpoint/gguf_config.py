"""Makes a transformers configuration from the header of a GGUF file.

Every key `ARCHITECTURE.*` is in one of these tables: it is honoured, it has no meaning for the model, or it must have
the value that changes nothing. Any other key is refused by name. Meanings and defaults are llama.cpp's
(llama-model.cpp: load_hparams, and the graphs of the architectures); transformers' own conversion drops most of
the keys. sources.py refuses tensors that no recipe knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from weightd.checkpoint.gguf_file import GgufFile, Value
from weightd.errors import CheckpointError

MODEL_TYPES = {
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
ACTIVATIONS = {"gemma3": ("hidden_activation", "gelu_pytorch_tanh")}
HONOURED = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "attention.scale", "attention.sliding_window", "attention.sliding_window_pattern", "attention.value_length",
    "block_count", "context_length", "embedding_length", "feed_forward_length", "final_logit_softcapping",
    "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear", "rope.scaling.attn_factor",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.type", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "vocab_size",
}  # fmt: skip
# These describe the file or how it was made, or belong to kinds of layers that these models lack.
WITHOUT_MEANING = {
    "rope.scaling.finetuned", "tensor_data_layout", "attention.layer_norm_epsilon", "expert_used_count",
    "expert_weights_norm", "expert_weights_scale", "expert_gating_func", "expert_feed_forward_length",
    "expert_shared_feed_forward_length", "interleave_moe_layer_step", "leading_dense_block_count",
}  # fmt: skip
# These must have this value: transformers' classes of the known architectures support no other.
NEUTRAL: Mapping[str, Any] = {
    "attention.causal": True, "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0,
    "attention.output_scale": 1.0, "attn_logit_softcapping": 0.0, "embedding_scale": 1.0, "expert_count": 0,
    "expert_group_count": 0,
    "expert_group_used_count": 0, "expert_shared_count": 0, "logit_scale": 1.0, "nextn_predict_layers": 0,
    "pooling_type": 0, "residual_scale": 1.0, "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_log_multiplier": 0.0, "router_logit_softcapping": 0.0,
    "swin_norm": False, "use_parallel_residual": False,
}  # fmt: skip
GEMMA3_27B_LAYERS = 62
GEMMA3_PATTERN = 6  # every sixth layer has full attention, the others a sliding window
FREQUENCIES = "rope_freqs.weight"


class GgufConfig:
    """Reads the keys of one file; `config()` is what config.json would hold."""

    def __init__(self, file: GgufFile, frequencies: npt.NDArray[np.float32] | None) -> None:
        self._file = file
        self._architecture = file.architecture
        self._frequencies = frequencies  # rope_freqs.weight: the divisors of the rotary frequencies
        self._check_keys()

    def config(self) -> dict[str, Any]:
        """CheckpointError names a key that is missing, has a wrong type, or cannot be honoured."""
        model_type, class_name = MODEL_TYPES[self._architecture]
        hidden, heads = self._size("embedding_length"), self._size("attention.head_count")
        layers = self._size("block_count")
        head_size = self._head_size(hidden // heads)
        config: dict[str, Any] = {
            "model_type": model_type,
            "architectures": [class_name],
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self._size("attention.head_count_kv", heads),
            "intermediate_size": self._size("feed_forward_length"),
            "max_position_embeddings": self._size("context_length"),
            "rms_norm_eps": self._positive("attention.layer_norm_rms_epsilon"),
            "vocab_size": self._vocabulary(),
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
            "rope_parameters": self._rope(head_size),
        }
        name, function = ACTIVATIONS.get(self._architecture, ("hidden_act", "silu"))
        config[name] = function
        if self._architecture == "llama":
            config["attention_bias"] = any(name.endswith("attn_q.bias") for name in self._file.tensors)
        if self._architecture != "qwen2" or head_size != hidden // heads:
            config["head_dim"] = head_size
        self._add_attention(config, head_size)
        return config | self._token_ids(config["vocab_size"])

    # Keys

    def _check_keys(self) -> None:
        prefix = f"{self._architecture}."
        for key in self._file.metadata:
            name = key.removeprefix(prefix)
            if name == key or name in HONOURED or name in WITHOUT_MEANING:
                continue
            value = self._value(name)
            if name not in NEUTRAL:
                self._refuse(name, value, "which weightd does not know")
            if not _equal(value, NEUTRAL[name]):
                self._refuse(name, value, f"and only {NEUTRAL[name]!r} can be run")

    def _refuse(self, name: str, value: Any, why: str) -> NoReturn:
        if value is None:
            raise CheckpointError(f"{self._file.path} lacks {self._architecture}.{name}")
        raise CheckpointError(f"{self._file.path} has {self._architecture}.{name} = {value!r}, {why}")

    def _value(self, name: str) -> Any:
        """The key's value, or None. An array with one value for all layers is that value."""
        value = self._file.metadata.get(f"{self._architecture}.{name}")
        if value is None:
            return None
        if isinstance(value.content, np.ndarray | list):
            items = list(np.asarray(value.content).tolist())
            if name != "attention.sliding_window_pattern" and items and all(item == items[0] for item in items):
                return items[0]
            return items
        return value.content

    def _size(self, name: str, default: int | None = None) -> int:
        value = self._value(name)
        value = default if value is None else value
        if type(value) is not int or value <= 0:
            self._refuse(name, value, "expected one positive number")
        return int(value)

    def _positive(self, name: str, default: float | None = None) -> float:
        value = self._value(name)
        value = default if value is None else value
        number = float(value) if value is not None and type(value) in (int, float) else math.nan
        if not 0 < number < math.inf:
            self._refuse(name, value, "expected a positive number")
        return number

    def _optional(self, name: str) -> float | None:
        """A positive number. None if the key is missing, or 0, which turns the feature off."""
        value = self._value(name)
        return None if value is None or value == 0 else self._positive(name)

    # Shapes

    def _head_size(self, default: int) -> int:
        key, value = self._size("attention.key_length", default), self._size("attention.value_length", default)
        if key != value:
            self._refuse("attention.value_length", value, f"and keys of {key} elements: they must be the same")
        rotated = self._size("rope.dimension_count", key)
        if rotated != key:
            self._refuse("rope.dimension_count", rotated, f"but heads have {key} elements: all of them must be rotated")
        return key

    def _vocabulary(self) -> int:
        """The rows of the embedding. The vocabulary may be padded, and the key of its size may be missing."""
        embedding = self._file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(f"{self._file.path} lacks the tensor token_embd.weight")
        rows = embedding.shape[0]
        if self._size("vocab_size", rows) != rows:
            self._refuse("vocab_size", self._value("vocab_size"), f"but token_embd.weight has {rows} rows")
        tokens = self._file.metadata.get("tokenizer.ggml.tokens")
        if tokens is not None and isinstance(tokens.content, list) and len(tokens.content) > rows:
            raise CheckpointError(
                f"{self._file.path} has {len(tokens.content)} tokens, but token_embd.weight has {rows} rows"
            )
        return rows

    def _token_ids(self, vocabulary: int) -> dict[str, int | None]:
        ids: dict[str, int | None] = {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            ids[f"{name}_token_id"] = token_id(self._file, key, vocabulary)
        return ids

    # Attention

    def _add_attention(self, config: dict[str, Any], head_size: int) -> None:
        window, cap = self._value("attention.sliding_window") or 0, self._optional("final_logit_softcapping")
        scale = self._optional("attention.scale")
        if self._architecture != "gemma3":
            self._require_no("attention.sliding_window", window)
            self._require_no("attention.sliding_window_pattern", self._value("attention.sliding_window_pattern"))
            self._require_no("rope.freq_base_swa", self._value("rope.freq_base_swa"))
            self._require_no("final_logit_softcapping", cap)
            if scale is not None and not math.isclose(scale, head_size**-0.5, rel_tol=1e-5):
                self._refuse("attention.scale", scale, f"and only {head_size**-0.5:.6g} can be run")
            return
        layers = config["num_hidden_layers"]
        # transformers needs a window even if no layer uses it.
        config["sliding_window"] = self._size("attention.sliding_window" if window else "context_length")
        config["layer_types"] = self._layer_types(layers) if window else ["full_attention"] * layers
        config["final_logit_softcapping"] = cap
        # As f_attention_scale in llama.cpp, which knows 27B by its number of layers. Otherwise the head's width counts.
        is_27b = layers == GEMMA3_27B_LAYERS
        scalar = config["hidden_size"] // config["num_attention_heads"] if is_27b else head_size
        config["query_pre_attn_scalar"] = scalar if scale is None else round(scale**-2)

    def _require_no(self, name: str, value: Any) -> None:
        if value:
            self._refuse(name, value, f"which {self._architecture} models do not have")

    def _layer_types(self, layers: int) -> list[str]:
        pattern = self._value("attention.sliding_window_pattern")
        pattern = GEMMA3_PATTERN if pattern is None else pattern
        if isinstance(pattern, list):
            if len(pattern) != layers:
                self._refuse("attention.sliding_window_pattern", pattern, f"but there are {layers} layers")
            slides = [bool(one) for one in pattern]
        else:
            period = self._size("attention.sliding_window_pattern", GEMMA3_PATTERN)
            slides = [(index + 1) % period != 0 for index in range(layers)]
        return ["sliding_attention" if slide else "full_attention" for slide in slides]

    # Rotary embedding

    def _rope(self, head_size: int) -> dict[str, Any]:
        default = None if self._architecture == "gemma3" else 10000.0  # llama.cpp and transformers differ for gemma3
        scaled = {"rope_theta": self._positive("rope.freq_base", default), **self._scaling(head_size)}
        if self._architecture != "gemma3":
            return scaled
        local = {"rope_type": "default", "rope_theta": self._positive("rope.freq_base_swa", 10000.0)}
        return {"full_attention": scaled, "sliding_attention": local}

    def _scaling(self, head_size: int) -> dict[str, Any]:
        kind = self._value("rope.scaling.type")
        factor = self._optional("rope.scaling.factor") or self._optional("rope.scale_linear") or 1.0
        kind = kind if kind is not None else "linear"  # as in llama.cpp; a factor of 1 scales nothing
        attention = self._optional("rope.scaling.attn_factor") or 1.0
        if self._frequencies is not None:
            if self._architecture == "gemma3":
                raise CheckpointError(f"{self._file.path} holds {FREQUENCIES}, which gemma3 models do not have")
            return self._divided(head_size, kind if factor != 1.0 else "none", attention)
        if kind == "yarn":
            return self._yarn(factor, attention)
        if attention != 1.0:
            self._refuse("rope.scaling.attn_factor", attention, "which only yarn has")
        if kind not in ("none", "linear"):
            self._refuse("rope.scaling.type", kind, "known are none, linear and yarn")
        if kind == "none" or factor == 1.0:
            return {"rope_type": "default"}
        return {"rope_type": "linear", "factor": factor}

    def _yarn(self, factor: float, attention: float) -> dict[str, Any]:
        found = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self._size(
                "rope.scaling.original_context_length", self._size("context_length")
            ),
            "beta_fast": self._positive("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": self._positive("rope.scaling.yarn_beta_slow", 1.0),
        }
        if attention != 1.0:
            found["attention_factor"] = attention * (1.0 + 0.1 * math.log(factor))
        return found

    def _divided(self, head_size: int, kind: str, attention: float) -> dict[str, Any]:
        """Each frequency has its own divisor, as in Llama 3: longrope of transformers with equal factors."""
        if kind != "none" or attention != 1.0:
            self._refuse("rope.scaling.type", kind, f"together with the tensor {FREQUENCIES}: one of them can be run")
        factors = self._frequencies
        assert factors is not None
        if factors.shape != (head_size // 2,) or not np.isfinite(factors).all() or not (factors > 0).all():
            raise CheckpointError(f"{self._file.path} has {FREQUENCIES} that are not {head_size // 2} positive numbers")
        if (factors == 1.0).all():
            return {"rope_type": "default"}
        divisors = [float(factor) for factor in factors]
        return {
            "rope_type": "longrope",
            "short_factor": divisors,
            "long_factor": divisors,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": self._size("context_length"),
        }


def token_id(file: GgufFile, key: str, vocabulary: int) -> int | None:
    """The value of tokenizer.ggml.`key`_token_id, or None. CheckpointError if there is no token with that id."""
    value: Value | None = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if value is None or value.content in (-1, 0xFFFFFFFF):  # llama.cpp's LLAMA_TOKEN_NULL
        return None
    if type(value.content) is not int or not 0 <= value.content < vocabulary:
        raise CheckpointError(
            f"{file.path} has tokenizer.ggml.{key}_token_id = {value.content!r}, but {vocabulary} tokens"
        )
    return value.content


def _equal(value: Any, expected: Any) -> bool:
    if isinstance(expected, bool):
        return value is expected
    return type(value) in (int, float) and bool(value == expected)
