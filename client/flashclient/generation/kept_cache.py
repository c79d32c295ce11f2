"""The keys and values of a conversation, kept for its next turn, which then computes only its new tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from flashclient.kernels.growing_cache import GrowingCache, GrowingWindowLayer


class KeptCache:
    """The cache of the last conversation of a client, and its tokens.

    A token's keys and values depend on the tokens before it alone, so any beginning that two prompts have in common is
    reused, and changes no bit of the result.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._cache: GrowingCache | None = None

    def take(self, prompt: Sequence[int], is_long: Callable[[int], bool]) -> GrowingCache | None:
        """The cache with what it has in common with `prompt`, but never its last token, which must be computed.

        None where nothing can be reused. The caller has the cache from then on, and gives it back with keep().

        Args:
            is_long: whether so many tokens rotate by long factors: others than those that were kept, perhaps.
        """
        cache, self._cache = self._cache, None
        if cache is None or is_long(len(prompt)) != is_long(len(self._tokens)):
            return None
        pairs = zip(self._tokens, prompt[:-1], strict=False)
        common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        return cache if common > 0 and _cut(cache, common) else None

    def keep(self, tokens: Sequence[int], cache: Any) -> None:
        """Keeps a cache that holds the keys and values of `tokens`, or of more: then the others are removed."""
        usable = isinstance(cache, GrowingCache) and len(tokens) > 0 and _cut(cache, len(tokens))
        self._tokens, self._cache = (list(tokens), cache) if usable else ([], None)


def _cut(cache: GrowingCache, tokens: int) -> bool:
    """Removes all but the first `tokens` tokens. False where a layer cannot do so: it holds a state, or no longer
    holds the tokens of its window."""
    removed = cache.get_seq_length() - tokens
    if removed < 0 or not cache.holds_tokens:
        return False
    for layer in cache.layers:
        if removed and isinstance(layer, GrowingWindowLayer) and layer.held_at[1] < layer.get_seq_length():
            return False
    if removed:
        cache.crop(-removed)  # older transformers also take a length, newer ones do not
    return True
