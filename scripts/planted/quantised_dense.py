"""A dense model (SwiGLU) with all matrices in blocks, random: a GGUF file, which weightd and llama.cpp read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from planted.blocks import KINDS, BlockKind, BlockNoise, Matrix
from planted.dense import NORM_EPSILON, ROPE_THETA
from planted.gguf_file import joined, name_tensor, new_writer, write_front
from planted.shards import new_folder
from planted.store import PlantedStore, import_once

SEED = 0


@dataclass(frozen=True)
class QuantisedDense:
    """Sizes of a model, which has Llama's architecture. Rows of all matrices are whole blocks."""

    hidden_size: int
    ffn_size: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context_tokens: int = 2048
    encoding: str = "Q4_K"  # one of planted.blocks.KINDS

    @property
    def blocks(self) -> BlockKind:
        return KINDS[self.encoding]

    @property
    def kv_size(self) -> int:
        return self.hidden_size // self.heads * self.kv_heads

    @property
    def layer(self) -> dict[str, tuple[int, int]]:
        """The matrices of a layer: [rows, columns] by their names in the file."""
        size, ffn_size = self.hidden_size, self.ffn_size
        return {
            "attn_q": (size, size),
            "attn_k": (self.kv_size, size),
            "attn_v": (self.kv_size, size),
            "attn_output": (size, size),
            "ffn_gate": (ffn_size, size),
            "ffn_up": (ffn_size, size),
            "ffn_down": (size, ffn_size),
        }

    @property
    def needed_bytes(self) -> int:
        """Of the matrices that a token needs: all but the embeddings."""
        matrix_bytes = self.blocks.matrix_bytes
        layer_bytes = sum(matrix_bytes(*size) for size in self.layer.values())
        return matrix_bytes(self.vocabulary, self.hidden_size) + self.layers * layer_bytes

    @property
    def keys(self) -> dict[str, int | float]:
        """Of the file's header."""
        return {
            "context_length": self.context_tokens,
            "embedding_length": self.hidden_size,
            "block_count": self.layers,
            "feed_forward_length": self.ffn_size,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.layer_norm_rms_epsilon": NORM_EPSILON,
            "rope.freq_base": ROPE_THETA,
            "rope.dimension_count": self.hidden_size // self.heads,
            "vocab_size": self.vocabulary,
        }


QUANTISED = {
    "llama-3-8b-q4_k": QuantisedDense(4096, 14336, 32, 32, 8, 128256),
    "qwen-7b-q4_k": QuantisedDense(4096, 11008, 32, 32, 32, 151936),
    # ChatGLM's FFN has two matrices of 16384 neurons; here it has three with as many weights.
    "chatglm-6b-q4_k": QuantisedDense(4096, 11008, 28, 32, 32, 130560),
    "llama-1.3b-q8_0": QuantisedDense(2048, 5504, 24, 16, 16, 32000, encoding="Q8_0"),
    "llama-1.3b-q4_0": QuantisedDense(2048, 5504, 24, 16, 16, 32000, encoding="Q4_0"),
    "llama-tiny-q4_0": QuantisedDense(256, 1024, 4, 4, 4, 2048, encoding="Q4_0"),
    "llama-tiny-q4_k": QuantisedDense(256, 1024, 4, 4, 4, 2048),
}


def quantised_store(name: str, folder: Path, layers: int | None = None) -> PlantedStore:
    """The file and the store of one of QUANTISED in `folder`. Makes those that are missing.

    Args:
        layers: of the model, if not those of the shape.

    Raises:
        BenchError, OSError: as planted_store() does.
    """
    shape, name = QUANTISED[name], f"planted-{name}"
    if layers is not None:
        shape, name = replace(shape, layers=layers), f"{name}-{layers}"
    made = PlantedStore(folder / name / f"{name}.gguf", folder / f"store-{name}", name)
    if not made.checkpoint.exists():
        with new_folder(made.checkpoint.parent, 2 * shape.needed_bytes) as partial:
            write_quantised(shape, partial / made.checkpoint.name)
    import_once(made)
    return made


def write_quantised(shape: QuantisedDense, path: Path) -> None:
    """Writes the file. One matrix is in memory at a time."""
    writer = new_writer(path, "llama", shape.keys)
    writer.add_tokenizer_model("none")
    noise = BlockNoise(shape.blocks, SEED)
    for name, size in _sizes(shape):
        name_tensor(writer, name, _like(size, shape.blocks), shape.blocks)
    write_front(writer)
    for name, size in _sizes(shape):
        writer.write_tensor_data(joined(name, [_random(noise, size)]))
    writer.close()


def _sizes(shape: QuantisedDense) -> Iterator[tuple[str, tuple[int, ...]]]:
    """All tensors of the file."""
    norm, matrix = (shape.hidden_size,), (shape.vocabulary, shape.hidden_size)
    yield from {"token_embd.weight": matrix, "output_norm.weight": norm, "output.weight": matrix}.items()
    for layer in range(shape.layers):
        of_layer = shape.layer | {"attn_norm": norm, "ffn_norm": norm}
        yield from ((f"blk.{layer}.{name}.weight", size) for name, size in of_layer.items())


def _like(size: tuple[int, ...], blocks: BlockKind) -> NDArray[Any]:
    """An array of the shape and dtype that _random() gives joined, without memory of its own."""
    if len(size) == 1:
        return np.broadcast_to(np.float32(1), size)
    rows, columns = size
    return np.broadcast_to(np.uint8(0), (rows, blocks.matrix_bytes(1, columns)))


def _random(noise: BlockNoise, size: tuple[int, ...]) -> Matrix:
    """Norms are ones; other matrices keep the variance of what they are multiplied with."""
    if len(size) == 1:
        return torch.ones(size)
    rows, columns = size
    return noise.matrix(rows, columns, columns**-0.5)
