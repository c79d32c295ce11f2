"""A quantised model of which there is only the configuration, as the checkpoint that an import would find."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weightd.checkpoint.checkpoint import Checkpoint
from weightd.checkpoint.quantisation.expected import HEAD, expected
from weightd.disk.tensors import SourceTensor
from weightd_proto.encodings import plain
from weightd_proto.weightd_pb2 import MatrixSource, Recipe

ROWS_MIN = 8  # of a matrix that a publisher quantises: gates of shared experts have one

Shape = tuple[int, ...]


def checkpoint_of(recipe: Recipe, config: Mapping[str, Any], path: Path, dtype: str) -> tuple[Recipe, Checkpoint]:
    """The recipe of what is published, and a checkpoint without files: nothing but numbers can be read from it.

    Args:
        recipe: names the tensors of transformers, as derive_from_config() makes it.
        dtype: of what is not quantised.
    """
    published = Recipe()
    published.CopyFrom(recipe)
    shapes = dict(_of_ffns(published))
    experts = list(shapes)
    linear = shapes | {
        source.source.tensor: tuple(source.shape)
        for source in published.resident
        if source.rows and len(source.shape) == 2 and source.shape[0] >= ROWS_MIN
        if all(layer.experts != source.shape[0] for layer in published.model.layers)
        if any(part.isdigit() or part == HEAD for part in source.name.split("."))
    }
    tensors = {name: SourceTensor(name, shape, plain(dtype), path, 0) for name, shape in shapes.items()}
    for source in published.resident:
        stored = plain("F32" if dtype in source.f32_in else dtype)
        tensors[source.source.tensor] = SourceTensor(source.source.tensor, tuple(source.shape), stored, path, 0)
    tensors |= expected(path, config, linear, experts, dtype)
    return published, Checkpoint(path, config, tensors, lambda _: None)


def _of_ffns(recipe: Recipe) -> Iterator[tuple[str, Shape]]:
    """The shapes [..., outputs, inputs] of their matrices. Those that lie transposed in `recipe` are turned in it:
    publishers of quantised weights have rows of outputs."""
    ends: dict[str, int] = {}
    matrices: dict[str, int] = {}
    down: set[str] = set()
    for ffn, layer in zip(recipe.ffns, recipe.model.layers, strict=True):
        for expert in ffn.experts:
            neurons = layer.neurons // len(ffn.experts)
            for part in expert.parts:
                ends[part.tensor] = max(ends.get(part.tensor, 0), part.first + part.step * (neurons - 1) + 1)
                matrices[part.tensor] = max(matrices.get(part.tensor, 0), part.matrix + 1)
            last: MatrixSource = expert.parts[-1]
            down.add(last.tensor)
            for part in expert.parts:
                part.columns = part.tensor == last.tensor
    for tensor, end in ends.items():
        hidden = recipe.model.bundle.hidden_size
        matrix = (hidden, end) if tensor in down else (end, hidden)
        yield tensor, matrix if matrices[tensor] == 1 else (matrices[tensor], *matrix)
