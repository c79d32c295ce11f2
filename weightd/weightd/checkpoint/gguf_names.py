"""llama.cpp's names for transformers' tensors, and how its converter changed their values.

llama.cpp's converter (convert_hf_to_gguf.py) permutes the rows of Q and K in architecture llama, and adds one to
Gemma's norms. transformers undoes the same (modeling_gguf_pytorch_utils.py).
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
    """A change of the converter to undo. With `heads`, the rows of each head were interleaved (rotary halves side by
    side). With `heads` = 0, one was added to each value."""

    heads: int = 0


class GgufNames:
    """Finds llama.cpp's name of a tensor and the change to undo, by transformers' name."""

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
    """Returns the architecture. CheckpointError for an unknown one lists the known ones."""
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"unknown GGUF architecture {architecture!r}: known are {', '.join(ARCHITECTURES)}")
    return architecture
