"""A checkpoint of a published shape with random weights whose FFNs are dense: SwiGLU, where every neuron counts.

It serves to measure speed. Its text is noise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planted.layers import Noise
from planted.plan import Shape
from planted.shapes import checkpoint_shapes
from planted.shards import Shards, new_folder, write_json

DTYPE = torch.bfloat16
EMBEDDING = "model.embed_tokens.weight"


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


def bytes_of(sizes: Iterable[tuple[int, ...]]) -> int:
    """The bytes of tensors of these sizes."""
    return sum(torch.Size(size).numel() for size in sizes) * DTYPE.itemsize


def _random(noise: Noise, size: tuple[int, ...]) -> Tensor:
    """Norms are ones; other matrices keep the variance of what they are multiplied with."""
    if len(size) == 1:
        return torch.ones(size, dtype=DTYPE)
    rows, columns = size
    return noise.matrix(rows, columns, columns**-0.5)
