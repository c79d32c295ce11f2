"""A planted OPT as a GGUF file for llama.cpp, which does not know OPT: as a GPT-2, which has the same matrices.

Its activation is GELU, so all of its neurons count, and its text is another. It serves to measure speed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from planted.dense import bytes_of
from planted.gguf_file import write_gguf
from planted.plan import Shape
from planted.shapes import checkpoint_shapes
from planted.shards import new_folder

NORM_EPSILON = 1e-5
PLACES_BESIDE = 2  # rows of OPT's embedding of positions, for padding
OUTSIDE = {"token_embd": "embed_tokens", "position_embd": "embed_positions", "output_norm": "final_layer_norm"}
QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
OF_LAYER = {
    "attn_norm": ("self_attn_layer_norm",),
    "attn_qkv": QKV,
    "attn_output": ("self_attn.out_proj",),
    "ffn_norm": ("final_layer_norm",),
    "ffn_up": ("fc1",),
    "ffn_down": ("fc2",),
}


def write_gpt2_gguf(shape: Shape, checkpoint: Path, target: Path) -> None:
    """Writes the checkpoint to `target`, whose folder appears when it is complete.

    Raises:
        OSError: the folder exists, or the disk is too small.
    """
    keys: dict[str, int | float] = {
        "context_length": shape.context_tokens + PLACES_BESIDE,
        "embedding_length": shape.hidden_size,
        "block_count": shape.layers,
        "feed_forward_length": shape.ffn_size,
        "attention.head_count": shape.heads,
        "attention.layer_norm_epsilon": NORM_EPSILON,
        "vocab_size": shape.vocabulary,
    }
    sizes = checkpoint_shapes(shape.config("float16"))
    tensors: dict[str, list[str]] = {}

    def add(name: str, sources: Iterable[str]) -> None:
        for part in ("weight", "bias"):
            of_part = [f"model.decoder.{source}.{part}" for source in sources]
            if of_part[0] in sizes:
                tensors[f"{name}.{part}"] = of_part

    for name, source in OUTSIDE.items():
        add(name, [source])
    for layer in range(shape.layers):
        for name, sources in OF_LAYER.items():
            add(f"blk.{layer}.{name}", [f"layers.{layer}.{source}" for source in sources])
    with new_folder(target.parent, bytes_of(sizes.values())) as folder:
        write_gguf(folder / target.name, "gpt2", keys, tensors, checkpoint)
