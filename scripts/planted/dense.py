"""A checkpoint of a published shape with random weights whose FFNs are dense: SwiGLU, where every neuron counts.

It serves to measure speed. Its text is noise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

from planted.gguf_file import ATTENTION, OUTSIDE, write_gguf
from planted.layers import Noise
from planted.plan import Shape
from planted.shapes import checkpoint_shapes
from planted.shards import Shards, new_folder, write_json

DTYPE = torch.bfloat16
EMBEDDING = "model.embed_tokens.weight"
NORM_EPSILON, ROPE_THETA = 1e-6, 10000.0  # of transformers' LlamaConfig


def dense_config(shape: Shape) -> dict[str, Any]:
    """config.json of the shape, whose family is llama, with the activation of Llama."""
    return shape.config("bfloat16") | {"hidden_act": "silu"}


def make_dense_model(shape: Shape, target: Path, seed: int = 0) -> None:
    """Writes the checkpoint to `target`, which appears when it is complete. Holds one layer in memory.

    Raises:
        OSError: the disk is too small.
    """
    sizes_of = checkpoint_shapes(dense_config(shape))
    shards: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, size in sizes_of.items():
        layer = name.partition("layers.")[2].partition(".")[0]
        shards[layer or name][name] = size
    noise = Noise(seed, DTYPE)
    with new_folder(target, bytes_of(sizes_of.values())) as folder:
        written = Shards(folder, len(shards))
        for sizes in shards.values():
            written.write({name: _random(noise, size) for name, size in sizes.items()})
        written.write_index()
        write_json(folder / "config.json", dense_config(shape))
        write_json(folder / "generation_config.json", {"do_sample": False, "pad_token_id": 1})
        write_tokenizer(shape.vocabulary, folder)


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    """A tokenizer whose tokens are words of digits: the text of token 17 is "17"."""
    tokenizer = Tokenizer(WordLevel({str(token): token for token in range(vocabulary)}, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_dense_gguf(shape: Shape, checkpoint: Path, target: Path, as_qwen3: bool = False) -> None:
    """Writes the checkpoint as a GGUF file to `target`, whose folder appears when it is complete.

    Args:
        as_qwen3: of Qwen3's architecture, which is Llama's with norms of queries and keys. They are ones.

    Raises:
        OSError: the folder exists, or the disk is too small.
    """
    config = dense_config(shape)
    keys: dict[str, int | float] = {
        "context_length": shape.context_tokens,
        "embedding_length": shape.hidden_size,
        "block_count": shape.layers,
        "feed_forward_length": shape.ffn_size,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.heads,
        "attention.layer_norm_rms_epsilon": NORM_EPSILON,
        "rope.freq_base": ROPE_THETA,
        "rope.dimension_count": shape.hidden_size // shape.heads,
        "vocab_size": shape.vocabulary,
    }
    parts = {f"ffn_{part}.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    tensors = {name: [source] for name, source in OUTSIDE.items()}
    for layer in range(shape.layers):
        for name, source in (ATTENTION | parts).items():
            tensors[f"blk.{layer}.{name}"] = [f"model.layers.{layer}.{source}"]
    architecture, paired_heads, ones = config["model_type"], shape.heads, {}
    if as_qwen3:
        architecture, paired_heads = "qwen3", 0
        norms = (f"blk.{layer}.attn_{part}_norm.weight" for layer in range(shape.layers) for part in "qk")
        ones = dict.fromkeys(norms, shape.hidden_size // shape.heads)
        keys |= {f"attention.{each}_length": shape.hidden_size // shape.heads for each in ("key", "value")}
    with new_folder(target.parent, bytes_of(checkpoint_shapes(config).values())) as folder:
        write_gguf(folder / target.name, architecture, keys, tensors, checkpoint, paired_heads, ones)


def bytes_of(sizes: Iterable[tuple[int, ...]]) -> int:
    """The bytes of tensors of these sizes."""
    return sum(torch.Size(size).numel() for size in sizes) * DTYPE.itemsize


def _random(noise: Noise, size: tuple[int, ...]) -> Tensor:
    """Norms are ones; other matrices keep the variance of what they are multiplied with."""
    if len(size) == 1:
        return torch.ones(size, dtype=DTYPE)
    rows, columns = size
    return noise.matrix(rows, columns, columns**-0.5)
