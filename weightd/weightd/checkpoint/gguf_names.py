"""llama.cpp's names for transformers' tensors, and how its converter changed their values.

llama.cpp's converter (convert_hf_to_gguf.py) permutes the rows of Q and K in architecture llama, and adds one to
Gemma's norms. transformers undoes the same (modeling_gguf_pytorch_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from weightd.disk.tensors import SourceTensor, Undo
from weightd.errors import CheckpointError

ARCHITECTURES = ("gemma3", "llama", "qwen2", "qwen3")

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
    "qwen3": {
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm",
    },
    "gemma3": {
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}


class GgufNames:
    """Finds transformers' name of a tensor and the change to undo, by llama.cpp's name."""

    def __init__(self, architecture: str, config: Mapping[str, Any]) -> None:
        self._architecture = check_architecture(architecture)
        self._heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads")}
        self._modules = {theirs: ours for ours, theirs in _MODULES.items()}
        layer_modules = _LAYER_MODULES | _NORMS[architecture]
        self._layer_modules = {theirs: ours for ours, theirs in layer_modules.items()}

    def renamed(self, tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
        """The tensors by transformers' names. Those that the architecture does not have keep their names."""
        renamed: dict[str, SourceTensor] = {}
        for theirs, tensor in tensors.items():
            name = self.name_of(theirs)
            if name in renamed:
                raise CheckpointError(f"{tensor.path} holds {name} twice, as {renamed[name].name} and {theirs}")
            renamed[name] = replace(tensor, undo=self.undo_of(name))
        return renamed

    def name_of(self, name: str) -> str:
        """`blk.3.ffn_up.weight` -> `model.layers.3.mlp.up_proj.weight`"""
        module, _, kind = name.rpartition(".")
        if module in self._modules:
            return f"{self._modules[module]}.{kind}"
        block, _, rest = module.partition(".")
        layer, _, within = rest.partition(".")
        if block == "blk" and within in self._layer_modules:
            return f"model.layers.{layer}.{self._layer_modules[within]}.{kind}"
        return name

    def undo_of(self, name: str) -> Undo | None:
        if not name.startswith(("model.", "lm_head.")):
            return None
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
