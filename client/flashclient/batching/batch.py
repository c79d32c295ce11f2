"""Sequences that advance together: one cache of keys and values, and one forward pass a step for all of them.

The rows of the cache are as long as its longest sequence. The others are padded on the left, which changes no bit of
what a row computes. A sequence joins with a cache of its own, which its prompt has filled, and leaves at any step.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashclient.kernels.growing_cache import GrowingCache, GrowingLayer, GrowingWindowLayer
from flashclient.model.loaded import LoadedModel


class Batch:
    """The joined sequences of one model, one row each, in the order in which they joined.

    Not safe for several threads: the caller holds the model's turn.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._model: Any = loaded.model
        self._takes_positions = "position_ids" in inspect.signature(self._model.forward).parameters
        self._cache: GrowingCache | None = None
        self._lengths: list[int] = []  # tokens in the cache, by row

    @property
    def rows(self) -> int:
        return len(self._lengths)

    def join(self, cache: GrowingCache) -> None:
        """Adds a sequence as the last row. `cache` holds its tokens, and is not used any more.

        Only the first row may have a cache for which can_join() is False.
        """
        if self._cache is None:
            self._cache, self._lengths = cache, [cache.get_seq_length()]
            return
        columns = max(self._columns, cache.get_seq_length())
        self._cache = _joined(self._model.config, self._cache, cache, columns)
        self._lengths.append(cache.get_seq_length())

    def leave(self, row: int) -> None:
        """Removes a row."""
        del self._lengths[row]
        if not self._lengths:
            self._cache = None
            return
        assert self._cache is not None
        kept = [index for index in range(self.rows + 1) if index != row]
        self._cache = _selected(self._model.config, self._cache, kept, max(self._lengths))

    def clear(self) -> None:
        """Removes all rows."""
        self._cache, self._lengths = None, []

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feeds each row its next token. Returns the logits [rows, vocabulary] of the tokens after them."""
        more: dict[str, Any] = {}
        columns = self._columns
        if min(self._lengths) < columns:
            more["attention_mask"] = torch.tensor(
                [[0] * (columns - length) + [1] * (length + 1) for length in self._lengths]
            )
            if self._takes_positions:
                more["position_ids"] = torch.tensor([[length] for length in self._lengths])
        logits = feed(self._model, [[token] for token in tokens], self._cache, **more)
        self._lengths = [length + 1 for length in self._lengths]
        return logits

    @property
    def _columns(self) -> int:
        return max(self._lengths)


def feed(model: Any, rows: list[list[int]], cache: Any, **more: Any) -> Tensor:
    """The logits [rows, vocabulary] after the last token of each row."""
    with torch.no_grad():
        output = model(torch.tensor(rows), past_key_values=cache, use_cache=True, logits_to_keep=1, **more)
    logits: Tensor = output.logits[:, -1]
    return logits


def can_join(cache: GrowingCache) -> bool:
    """Whether each layer holds keys and values by token, and no state of another kind."""
    return all(isinstance(layer, GrowingLayer | GrowingWindowLayer) for layer in cache.layers)


def _joined(config: Any, first: GrowingCache, second: GrowingCache, columns: int) -> GrowingCache:
    joined = GrowingCache(config)
    layers: Any = zip(joined.layers, first.layers, second.layers, strict=True)
    for layer, one, other in layers:
        held = max(one.keys.shape[-2], other.keys.shape[-2])
        _fill(
            layer,
            torch.cat([_padded(one.keys, held), _padded(other.keys, held)]),
            torch.cat([_padded(one.values, held), _padded(other.values, held)]),
            columns,
        )
    return joined


def _selected(config: Any, cache: GrowingCache, rows: list[int], columns: int) -> GrowingCache:
    """Some rows, without columns at the beginning that are padding in all of them."""
    selected, index = GrowingCache(config), torch.tensor(rows)
    layers: Any = zip(selected.layers, cache.layers, strict=True)
    for layer, one in layers:
        held = min(columns, one.keys.shape[-2])
        keys, values = (states[..., -held:, :].index_select(0, index) for states in (one.keys, one.values))
        _fill(layer, keys, values, columns)
    return selected


def _fill(layer: Any, keys: Tensor, values: Tensor, columns: int) -> None:
    layer.update(keys, values)
    if isinstance(layer, GrowingWindowLayer):
        layer.cumulative_length = columns  # those that have left the window count, too


def _padded(states: Tensor, tokens: int) -> Tensor:
    """[rows, heads, tokens, elements], with zeros at the beginning."""
    return pad(states, (0, 0, tokens - states.shape[-2], 0))
