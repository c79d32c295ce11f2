"""Makes a transformers configuration from the header of a GGUF file.

gguf_architectures.py says which fields a model's class has, gguf_keys.py refuses what nothing has read. Meanings and
defaults are llama.cpp's (llama-model.cpp: load_hparams, and the graphs of the architectures); transformers' own
conversion drops most of the keys. The client refuses tensors that its model has no place for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from weightd.checkpoint.gguf_architectures import SIZES, Architecture
from weightd.checkpoint.gguf_file import GgufFile, Value
from weightd.checkpoint.gguf_keys import GgufKeys
from weightd.errors import CheckpointError

Vector = npt.NDArray[np.float32]

LAYERS_27B = {"gemma2": 46, "gemma3_text": 62}  # by which llama.cpp knows the models of 27 B
# Every so many layers, one has full attention, the others a sliding window.
PERIODS = {"gemma2": 2, "gemma3_text": 6, "gpt_oss": 2, "olmo3": 4}
# Divisors of the rotary frequencies: for all lengths, or for long and short contexts.
FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
VECTORS = (FREQUENCIES, LONG, SHORT)


class GgufConfig:
    """`config()` is what config.json would hold.

    `vectors`: the values of the tensors in VECTORS that the file has.
    """

    def __init__(
        self, file: GgufFile, keys: GgufKeys, architecture: Architecture, vectors: Mapping[str, Vector]
    ) -> None:
        self._file = file
        self._keys = keys
        self._architecture = architecture
        self._vectors = vectors

    def config(self) -> dict[str, Any]:
        """CheckpointError names a key that is missing, has a wrong type, or cannot be honoured."""
        architecture, keys = self._architecture, self._keys
        sizes = self._sizes()
        config: dict[str, Any] = {
            "model_type": architecture.model_type,
            "architectures": [architecture.model_class],
            "vocab_size": self._vocabulary(),
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
            **architecture.constants,
            **{name: keys.size(key) for name, key in architecture.sizes.items()},
        }
        config |= {own: sizes[name] for name in SIZES if (own := architecture.names.get(name, name)) is not None}
        key, name = architecture.norm
        config[name] = keys.positive(key)
        width = sizes["hidden_size"] // sizes["num_attention_heads"]
        head_size = self._head_size(width)
        if architecture.head_dim and (architecture.model_type != "qwen2" or head_size != width):
            config["head_dim"] = head_size
        rope = self._rope(head_size)  # read, so that its keys are known, by models without it, too
        if architecture.rope:
            config["rope_parameters"] = rope
        config |= {name: keys.optional(key) for name, key in architecture.caps.items()}
        config |= {name: keys.positive(key) for name, key in architecture.scales.items()}
        self._add_windows(config, sizes, head_size)
        self._add_by_tensors(config, sizes)
        mixture = "expert_count" in architecture.sizes.values()
        keys.check_all_read(mixture, normed=architecture.constants.get("norm_topk_prob", True))
        return config | self._token_ids(config["vocab_size"])

    # Shapes

    def _sizes(self) -> dict[str, int]:
        """The common sizes, whether the configuration has them or not."""
        keys = self._keys
        heads = keys.size("attention.head_count")
        sizes = {
            name: keys.size(key)
            for name, key in SIZES.items()
            if name not in ("num_key_value_heads", "max_position_embeddings")
        }
        sizes["num_key_value_heads"] = self._key_value_heads(heads)
        if self._architecture.names.get("max_position_embeddings", "") is not None:
            sizes["max_position_embeddings"] = keys.size("context_length")
        else:
            keys.value("context_length")
        experts = "intermediate_size" in self._architecture.sizes
        required = {"intermediate_size": 4 * sizes["hidden_size"], "num_key_value_heads": heads}
        for name, expected in required.items():
            if self._architecture.names.get(name, "") is None and not (experts and name == "intermediate_size"):
                keys.require(SIZES[name], expected)
        return sizes

    def _key_value_heads(self, heads: int) -> int:
        by_layer = self._keys.value("attention.head_count_kv")
        if self._architecture.model_type == "lfm2" and isinstance(by_layer, list) and len({*by_layer, 0}) == 2:
            return int(max(by_layer))  # 0: a layer without attention
        return self._keys.size("attention.head_count_kv", heads)

    def _head_size(self, default: int) -> int:
        keys = self._keys
        key, value = keys.size("attention.key_length", default), keys.size("attention.value_length", default)
        if key != value:
            keys.refuse("attention.value_length", value, f"and keys of {key} elements: they must be the same")
        if key != default and not self._architecture.head_dim:
            keys.refuse("attention.key_length", key, f"but heads have {default} elements")
        return key

    def _vocabulary(self) -> int:
        """The rows of the embedding. The vocabulary may be padded, and the key of its size may be missing."""
        embedding = self._file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(f"{self._file.path} lacks the tensor token_embd.weight")
        rows = embedding.shape[0]
        if self._keys.size("vocab_size", rows) != rows:
            self._keys.refuse("vocab_size", self._keys.value("vocab_size"), f"but token_embd.weight has {rows} rows")
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

    def _add_by_tensors(self, config: dict[str, Any], sizes: Mapping[str, int]) -> None:
        """Flags that follow from the tensors which the file has."""

        def has(*ends: str) -> bool:
            return any(name.startswith("blk.") and name.endswith(ends) for name in self._file.tensors)

        match self._architecture.model_type:
            case "llama" | "granite" | "arcee" | "smollm3":
                config["attention_bias"] = has("attn_q.bias")
                config["mlp_bias"] = has("ffn_up.bias")
            case "falcon":
                config["new_decoder_architecture"] = has("attn_norm_2.weight") or sizes["num_key_value_heads"] > 1
                config["multi_query"] = sizes["num_key_value_heads"] == 1
                if config["new_decoder_architecture"] and not has("attn_norm_2.weight"):
                    config["num_ln_in_parallel_attn"] = 1
            case "stablelm":
                config["use_qkv_bias"] = has("attn_q.bias")
                config["use_parallel_residual"] = not has("ffn_norm.weight")
                parallel = self._keys.value("use_parallel_residual")
                if parallel is not None and parallel is not config["use_parallel_residual"]:
                    self._keys.refuse("use_parallel_residual", parallel, "which its norms contradict")
            case "seed_oss":
                config["attention_bias"] = has("attn_q.bias")
                config["attention_out_bias"], config["mlp_bias"] = has("attn_output.bias"), has("ffn_up.bias")
            case "phi3":
                original = config["rope_parameters"].get("original_max_position_embeddings")
                config["original_max_position_embeddings"] = original or sizes["max_position_embeddings"]
            case "starcoder2":
                config["use_bias"] = has("attn_q.bias")
            case "nemotron":
                config["attention_bias"], config["mlp_bias"] = has("attn_q.bias"), has("ffn_up.bias")
            case "lfm2":
                layers = range(sizes["num_hidden_layers"])
                attending = {name.split(".")[1] for name in self._file.tensors if name.endswith("attn_q.weight")}
                kinds = ("conv", "full_attention")
                config["layer_types"] = [kinds[str(layer) in attending] for layer in layers]
                config["conv_bias"] = has("shortconv.in_proj.bias")
            case "minimax_m2":
                gating = self._keys.value("expert_gating_func")
                if gating not in (None, 2):  # llama.cpp's sigmoid
                    self._keys.refuse("expert_gating_func", gating, "and only 2, a sigmoid, can be run")

    # Attention

    def _add_windows(self, config: dict[str, Any], sizes: Mapping[str, int], head_size: int) -> None:
        keys, scale = self._keys, self._keys.optional("attention.scale")
        if self._architecture.windows == "all":
            config["sliding_window"] = keys.value("attention.sliding_window") or None
        if self._architecture.windows != "layers":
            self._require_scale(scale, head_size)
            return
        layers, window = sizes["num_hidden_layers"], keys.value("attention.sliding_window") or 0
        keys.value("attention.sliding_window_pattern")  # of no meaning without a window
        # transformers needs a window even if no layer uses it.
        config["sliding_window"] = keys.size("attention.sliding_window" if window else "context_length")
        config["layer_types"] = self._layer_types(layers) if window else ["full_attention"] * layers
        if self._architecture.model_type not in LAYERS_27B:
            self._require_scale(scale, head_size)
            return
        # As f_attention_scale in llama.cpp. Otherwise the head's width counts.
        is_27b = layers == LAYERS_27B[self._architecture.model_type]
        scalar = sizes["hidden_size"] // sizes["num_attention_heads"] if is_27b else head_size
        config["query_pre_attn_scalar"] = scalar if scale is None else round(scale**-2)

    def _require_scale(self, scale: float | None, head_size: int) -> None:
        if "attention.scale" in self._architecture.scales.values():
            return
        if scale is not None and not math.isclose(scale, head_size**-0.5, rel_tol=1e-5):
            self._keys.refuse("attention.scale", scale, f"and only {head_size**-0.5:.6g} can be run")

    def _layer_types(self, layers: int) -> list[str]:
        name = "attention.sliding_window_pattern"
        pattern = self._keys.value(name)
        if isinstance(pattern, list):
            if len(pattern) != layers:
                self._keys.refuse(name, pattern, f"but there are {layers} layers")
            slides = [bool(one) for one in pattern]
        else:
            period = self._keys.size(name, PERIODS[self._architecture.model_type])
            slides = [(index + 1) % period != 0 for index in range(layers)]
        return ["sliding_attention" if slide else "full_attention" for slide in slides]

    # Rotary embedding

    def _rope(self, head_size: int) -> dict[str, Any]:
        local = self._architecture.local_theta
        default = 10000.0 if not local else None  # llama.cpp and transformers differ for gemma3
        rotated = self._keys.size("rope.dimension_count", head_size)
        scaled: dict[str, Any] = {"rope_theta": self._keys.positive("rope.freq_base", default)}
        if rotated != head_size:
            if not self._architecture.partial:
                why = f"but heads have {head_size} elements: all of them must be rotated"
                self._keys.refuse("rope.dimension_count", rotated, why)
            scaled["partial_rotary_factor"] = rotated / head_size
        elif self._architecture.partial:
            scaled["partial_rotary_factor"] = 1.0
        scaled |= self._scaling(rotated)
        if local is None:
            return scaled
        theta = self._keys.positive("rope.freq_base_swa", local or scaled["rope_theta"])
        return {"full_attention": scaled, "sliding_attention": {"rope_type": "default", "rope_theta": theta}}

    def _scaling(self, rotated: int) -> dict[str, Any]:
        keys = self._keys
        kind = keys.value("rope.scaling.type")
        factor = keys.optional("rope.scaling.factor") or keys.optional("rope.scale_linear") or 1.0
        kind = kind if kind is not None else "linear"  # as in llama.cpp; a factor of 1 scales nothing
        attention = keys.optional("rope.scaling.attn_factor") or 1.0
        if LONG in self._vectors or SHORT in self._vectors:
            return self._long(rotated, kind, factor, attention)
        if FREQUENCIES in self._vectors:
            if self._architecture.windows == "layers":
                raise CheckpointError(f"{self._file.path} holds {FREQUENCIES}, which models with windows do not have")
            return self._divided(rotated, kind if factor != 1.0 else "none", attention)
        if kind == "yarn":
            return self._yarn(factor, attention)
        if attention != 1.0:
            keys.refuse("rope.scaling.attn_factor", attention, "which only yarn has")
        if kind not in ("none", "linear"):
            keys.refuse("rope.scaling.type", kind, "known are none, linear and yarn")
        keys.value("rope.scaling.original_context_length")  # of no meaning without scaling
        if kind == "none" or factor == 1.0:
            return {"rope_type": "default"}
        return {"rope_type": "linear", "factor": factor}

    def _yarn(self, factor: float, attention: float) -> dict[str, Any]:
        keys = self._keys
        found = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self._original_context(),
            "beta_fast": keys.positive("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": keys.positive("rope.scaling.yarn_beta_slow", 1.0),
        }
        if self._architecture.model_type == "gpt_oss":
            found["truncate"] = False
        if attention != 1.0:
            found["attention_factor"] = attention * (1.0 + 0.1 * math.log(factor))
        return found

    def _original_context(self) -> int:
        return self._keys.size("rope.scaling.original_context_length", self._keys.size("context_length"))

    def _long(self, rotated: int, kind: str, factor: float, attention: float) -> dict[str, Any]:
        """Divisors for short contexts, and others beyond the original context (Phi-3)."""
        if kind not in ("none", "linear", "longrope") or factor != 1.0:
            self._keys.refuse("rope.scaling.type", kind, f"together with the tensor {LONG}: one of them can be run")
        return {
            "rope_type": "longrope",
            "short_factor": self._divisors(SHORT, rotated),
            "long_factor": self._divisors(LONG, rotated),
            "factor": 1.0,
            "attention_factor": attention,
            "original_max_position_embeddings": self._original_context(),
        }

    def _divided(self, rotated: int, kind: str, attention: float) -> dict[str, Any]:
        """Each frequency has its own divisor, as in Llama 3: longrope of transformers with equal factors."""
        if kind != "none" or attention != 1.0:
            why = f"together with the tensor {FREQUENCIES}: one of them can be run"
            self._keys.refuse("rope.scaling.type", kind, why)
        divisors = self._divisors(FREQUENCIES, rotated)
        if all(divisor == 1.0 for divisor in divisors):
            return {"rope_type": "default"}
        return {
            "rope_type": "longrope",
            "short_factor": divisors,
            "long_factor": divisors,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": self._keys.size("context_length"),
        }

    def _divisors(self, name: str, rotated: int) -> list[float]:
        values = self._vectors.get(name)
        if values is None:
            raise CheckpointError(f"{self._file.path} lacks the tensor {name}")
        if values.shape != (rotated // 2,) or not np.isfinite(values).all() or not (values > 0).all():
            raise CheckpointError(f"{self._file.path} has {name} that are not {rotated // 2} positive numbers")
        return [float(value) for value in values]


def token_id(file: GgufFile, key: str, vocabulary: int) -> int | None:
    """The value of tokenizer.ggml.`key`_token_id, or None. CheckpointError if there is no token with that id."""
    value: Value | None = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if value is None:
        return None
    if type(value.content) is int and value.content in (-1, 0xFFFFFFFF):  # llama.cpp's LLAMA_TOKEN_NULL
        return None
    if type(value.content) is not int or not 0 <= value.content < vocabulary:
        raise CheckpointError(
            f"{file.path} has tokenizer.ggml.{key}_token_id = {value.content!r}, but {vocabulary} tokens"
        )
    return value.content
