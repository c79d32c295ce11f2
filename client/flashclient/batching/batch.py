"""Sequences that advance together: one cache of keys and values, and one forward pass a step for all of them.

The rows of the cache are as long as its longest sequence. The others are padded on the left, which changes no bit of
what a row computes. A sequence joins with a cache of its own, which its prompt has filled, and leaves at any step.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flashclient.batching.kept_prefixes import KeptPrefixes
from flashclient.kernels.growing_cache import GrowingCache, GrowingWindowLayer
from flashclient.model.loaded import LoadedModel


class Batch:
    """The joined sequences of one model, one row each, in the order in which they joined.

    Not safe for several threads: the caller holds the model's turn.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._model: Any = loaded.model
        self._new_cache = loaded.new_cache
        self._cache: GrowingCache | None = None
        self._lengths: list[int] = []  # tokens in the cache, by row

    @property
    def rows(self) -> int:
        return len(self._lengths)

    @property
    def tokens(self) -> int:
        """That its cache has room for: all rows are as long as the longest."""
        return self.rows * max(self._lengths, default=0)

    def keep(self, row: int, tokens: Sequence[int], owner: int, kept: KeptPrefixes) -> None:
        """Keeps the keys and values of a row.

        Args:
            tokens: of the row; perhaps more than are in the cache.
        """
        assert self._cache is not None
        kept.keep(tokens[: self._lengths[row]], self._cache, row, owner)

    def join(self, cache: GrowingCache, lengths: Sequence[int]) -> None:
        """Adds sequences as the last rows. `cache` holds their tokens, and is not used any more.

        Only the first row may have a cache that does not hold tokens (GrowingCache.holds_tokens).

        Args:
            lengths: tokens of each sequence; shorter ones are padded on the left.
        """
        if self._cache is None:
            self._cache, self._lengths = cache, list(lengths)
            return
        columns = max(self._columns, cache.get_seq_length())
        self._cache = _joined(self._new_cache(), self._cache, cache, columns)
        self._lengths += lengths

    def leave(self, rows: Collection[int]) -> None:
        """Removes rows."""
        kept = [row for row in range(self.rows) if row not in rows]
        if not kept:
            self.clear()
        elif len(kept) < self.rows:
            assert self._cache is not None
            self._lengths = [self._lengths[row] for row in kept]
            self._cache = _selected(self._new_cache(), self._cache, kept, self._columns)

    def clear(self) -> None:
        """Removes all rows."""
        self._cache, self._lengths = None, []

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feeds each row its next token. Returns the logits [rows, vocabulary] of the tokens after them."""
        logits = feed(self._model, [[token] for token in tokens], self._cache, self._lengths)
        self._lengths = [length + 1 for length in self._lengths]
        return logits

    @property
    def _columns(self) -> int:
        return max(self._lengths)


def feed(model: Any, rows: Sequence[Sequence[int]], cache: GrowingCache | None, held: Sequence[int]) -> Tensor:
    """The logits [rows, vocabulary] after the last token of each row.

    Args:
        rows: the next tokens of each. If there are none in the cache yet, rows may be of different lengths.
        held: the tokens of each row in the cache.
    """
    columns, width = max(held), max(map(len, rows))
    padding = [columns + width - length - len(row) for length, row in zip(held, rows, strict=True)]
    more: dict[str, Any] = {}
    if any(padding):
        more["attention_mask"] = mask = torch.ones(len(rows), columns + width, dtype=torch.long)
        for row, count in enumerate(padding):
            mask[row, :count] = 0
        kind: Any = type(model)
        if _takes_positions(kind):
            more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, columns:]
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    with torch.no_grad():
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **more)
    logits: Tensor = output.logits[:, -1]
    return logits


@cache
def _takes_positions(kind: Any) -> bool:
    return "position_ids" in inspect.signature(kind.forward).parameters


def _joined(joined: GrowingCache, first: GrowingCache, second: GrowingCache, columns: int) -> GrowingCache:
    """Fills an empty cache with the rows of two."""
    layers: Any = zip(joined.layers, first.layers, second.layers, strict=True)
    for layer, one, other in layers:
        held = max(one.keys.shape[-2], other.keys.shape[-2])
        rows = one.keys.shape[0] + other.keys.shape[0]
        rooms = layer.room_for(held, _empty(one.keys, rows), _empty(one.values, rows))
        for room, parts in zip(rooms, ((one.keys, other.keys), (one.values, other.values)), strict=True):
            for at, part in zip((0, one.keys.shape[0]), parts, strict=True):
                padding = held - part.shape[-2]
                room[at : at + part.shape[0], :, :padding] = 0
                room[at : at + part.shape[0], :, padding:held] = part
        _hold(layer, held, columns)
    return joined


def _selected(selected: GrowingCache, cache: GrowingCache, rows: list[int], columns: int) -> GrowingCache:
    """Fills an empty cache with some rows, without columns at the beginning that are padding in all of them."""
    layers: Any = zip(selected.layers, cache.layers, strict=True)
    for layer, one in layers:
        held = min(columns, one.keys.shape[-2])
        rooms = layer.room_for(held, _empty(one.keys, len(rows)), _empty(one.values, len(rows)))
        for room, states in zip(rooms, (one.keys, one.values), strict=True):
            for at, row in enumerate(rows):
                room[at, :, :held] = states[row, :, -held:]
        _hold(layer, held, columns)
    return selected


def _hold(layer: Any, held: int, columns: int) -> None:
    layer.add_written(held)
    if isinstance(layer, GrowingWindowLayer):
        layer.cumulative_length = columns  # those that have left the window count, too


def _empty(states: Tensor, rows: int) -> Tensor:
    """No tokens of so many sequences, otherwise like `states`."""
    return states.new_empty(rows, states.shape[1], 0, states.shape[3])
