"""Finds the tensors of a recipe in a checkpoint, under any of their names, and checks every shape.

A tensor that the recipe has no place for would be lost, so the import of such a checkpoint is refused.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from weightd.checkpoint.checkpoint import Checkpoint
from weightd.checkpoint.gguf_names import GgufNames
from weightd.disk.read_ahead import ReadAhead
from weightd.disk.tensors import SourceTensor
from weightd.errors import CheckpointError
from weightd.importing.dequantise import dequantise
from weightd.importing.families import HEAD, Recipe, Shape, TensorSource
from weightd.importing.plan import Slice
from weightd_proto.encodings import COMPUTE_DTYPES, DTYPES

# Tensors that follow from the configuration: rotary frequencies, a version. transformers skips them too.
IMPLIED = re.compile(r"(\.|^)(rotary_emb\.inv_freq|decoder\.version|rope_freqs\.weight)$")
COMPARED_BYTES = 8 << 20  # of a head and an embedding at a time


def sources_of(recipe: Recipe, checkpoint: Checkpoint) -> tuple[Recipe, dict[str, TensorSource]]:
    """The source of every tensor of the recipe, and the recipe as the checkpoint has it.

    The recipe gets a head of its own if the configuration ties head and embedding, but the checkpoint holds both with
    different values. CheckpointError names the first tensor that is missing, has another shape than the configuration
    says, or is not F32, BF16 or F16 (quantised GGUF types become F32), and the first tensor that nothing uses.
    """
    names = GgufNames(checkpoint.gguf_architecture, checkpoint.config) if checkpoint.gguf_architecture else None

    def spellings(name: str) -> list[str]:
        return [names.name_of(name)] if names else _spellings(name)

    def find(name: str) -> TensorSource | None:
        for spelling in spellings(name):
            if spelling in checkpoint.tensors:
                return TensorSource(checkpoint.tensors[spelling], names.undo_of(name) if names else None)
        return None

    found = {name: find(name) for name in recipe.shapes()}
    if recipe.tied_to is not None:
        recipe = _with_head(recipe, found, find(HEAD), recipe.tied_to)
    sources: dict[str, TensorSource] = {}
    for name, shape in recipe.shapes().items():
        source = found[name]
        if source is None:
            looked_for = " and ".join(spellings(name))
            raise CheckpointError(f"{checkpoint.path} lacks the tensor {name} (looked for {looked_for})")
        _check(name, shape, source.tensor)
        sources[name] = source
    _check_unused(checkpoint, {source.tensor.name for source in found.values() if source is not None})
    return recipe, sources


def _with_head(
    recipe: Recipe, found: dict[str, TensorSource | None], head: TensorSource | None, embedding: str
) -> Recipe:
    """Handles checkpoints with lm_head although tie_word_embeddings is set. Returns the recipe to use.

    As in transformers' tie_weights(), the head replaces a missing embedding. If the embedding is there and differs, the
    head becomes a matrix of its own.
    """
    shape = recipe.resident[embedding]
    if head is None:
        return recipe
    source = found[embedding]
    found[HEAD] = head
    if source is None:
        found[embedding] = head
        return recipe
    _check(HEAD, shape, head.tensor)
    _check(embedding, shape, source.tensor)
    return recipe if _equal(source, head) else replace(recipe, resident={**recipe.resident, HEAD: shape})


def _equal(one: TensorSource, other: TensorSource) -> bool:
    """Whether two matrices of the same shape hold the same values. In torch's files one matrix may have two names."""
    if one == replace(other, tensor=replace(other.tensor, name=one.tensor.name)):
        return True
    pieces = [piece for pair in zip(_rows(one), _rows(other), strict=True) for piece in pair]
    with ReadAhead([piece.extent for piece in pieces]) as read_ahead:
        for first, second in zip(pieces[::2], pieces[1::2], strict=True):
            with read_ahead.take(first.extent) as a, read_ahead.take(second.extent) as b:
                values, others = dequantise(one, a).as_dtype("F32"), dequantise(other, b).as_dtype("F32")
                if not np.array_equal(values, others):
                    return False
    return True


def _rows(source: TensorSource) -> list[Slice]:
    rows, width = source.tensor.shape
    step = max(1, COMPARED_BYTES // (width * DTYPES["F32"].bytes))
    return [Slice(source, begin, min(rows, begin + step)) for begin in range(0, rows, step)]


def _check(name: str, shape: Shape, tensor: SourceTensor) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)} in {tensor.path}, but the configuration says {list(shape)}"
        )
    if tensor.dtype not in COMPUTE_DTYPES.values():
        known = ", ".join(COMPUTE_DTYPES.values())
        raise CheckpointError(f"{name} has dtype {tensor.dtype} in {tensor.path}, known are {known}")


def _check_unused(checkpoint: Checkpoint, used: set[str]) -> None:
    """CheckpointError for tensors that the model has no place for: biases, layers, experts, adapters."""
    unused = sorted(name for name in checkpoint.tensors.keys() - used if not IMPLIED.search(name))
    if unused:
        raise CheckpointError(
            f"{checkpoint.path} holds {len(unused)} tensors that its configuration has no place for, first "
            f"{unused[0]}: correct the configuration, or remove them"
        )


def _spellings(name: str) -> list[str]:
    """The names with and without the prefix `model.`: transformers saves a model with its head, or without."""
    return [name, name.removeprefix("model.")]
