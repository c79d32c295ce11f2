"""llama.cpp's names for transformers' tensors, and what its converter did to their values.

As in llama.cpp's conversion (convert_hf_to_gguf.py) and in its undoing by transformers
(modeling_gguf_pytorch_utils.py): rows of Q and K are permuted in architecture llama only, Gemma's norms are stored
plus one. Tensors not asked for (rope_freqs, which the configuration implies) are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightd.errors import CheckpointError

ARCHITECTURES = ("gemma3", "llama", "qwen2")

_MODULES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {
    "llama": {"post_attention_layernorm": "ffn_norm"},
    "qwen2": {"post_attention_layernorm": "ffn_norm"},
    "gemma3": {
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}


@dataclass(frozen=True)
class Undo:
    """What to undo: rows interleaved within each of `heads` heads (rotary halves side by side), or, `heads` = 0, a one
    that was added."""

    heads: int = 0


class GgufNames:
    """Names and undoings for one architecture, by transformers' names."""

    def __init__(self, architecture: str, config: Mapping[str, Any]) -> None:
        self._architecture = check_architecture(architecture)
        self._heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads")}
        self._layer_modules = _LAYER_MODULES | _NORMS[architecture]

    def name_of(self, name: str) -> str:
        """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`"""
        module, kind = name.rsplit(".", 1)
        if module in _MODULES:
            return f"{_MODULES[module]}.{kind}"
        _, _, layer, within = module.split(".", 3)
        return f"blk.{layer}.{self._layer_modules[within]}.{kind}"

    def undo_of(self, name: str) -> Undo | None:
        module = name.rsplit(".", 2)[-2]
        if self._architecture == "llama" and module in self._heads:
            return Undo(self._heads[module] or self._heads["q_proj"])
        if self._architecture == "gemma3" and module.endswith("norm"):
            return Undo()
        return None


def check_architecture(architecture: str) -> str:
    """The architecture itself; CheckpointError lists the known ones."""
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"unknown GGUF architecture {architecture!r}: known are {', '.join(ARCHITECTURES)}")
    return architecture
