"""Keys and values of earlier prompts and answers, for prompts that begin with the same tokens.

They lie in trees of spans of tokens, one for each owner: what is reused tells that somebody has sent the same, by its
count and its time. A conversation is a path from the root; conversations with the same beginning share its spans. A
token's keys and values depend on the tokens before it alone, so what is reused changes no bit.

The least recently used span goes first. A span is used whenever one behind it is, so those behind it have gone before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import Tensor

from flashclient.kernels.growing_cache import GrowingCache, GrowingWindowLayer


@dataclass(eq=False)
class _Span:
    """Tokens that follow each other.

    Attributes:
        states: keys and values of each layer, [heads, held, elements]. A layer with a window may hold fewer than all
            tokens: the last ones.
    """

    tokens: list[int]
    states: list[tuple[Tensor, Tensor]]
    before: _Span | None
    behind: dict[int, _Span] = field(default_factory=dict)  # by their first token


class KeptPrefixes:
    """Not safe for several threads.

    Args:
        config: of the model.
        tokens_max: that are kept. Nothing is kept if the model's cache holds states of another kind.
    """

    def __init__(self, config: Any, tokens_max: int) -> None:
        self._config = config
        layers: list[Any] = GrowingCache(config).layers
        self._holds_tokens = GrowingCache(config).holds_tokens
        self._windows = [one.sliding_window - 1 if isinstance(one, GrowingWindowLayer) else None for one in layers]
        self._tokens_max = self._room = tokens_max
        self._roots: dict[int, _Span] = {}  # by owner
        self._spans: OrderedDict[_Span, None] = OrderedDict()  # the least recently used first
        self.tokens = 0  # that are kept

    def keep(self, tokens: Sequence[int], cache: GrowingCache, row: int, owner: int = 0) -> None:
        """Copies the keys and values of a sequence: those of the last len(tokens) columns of a row of `cache`."""
        if not self._holds_tokens or not tokens or len(tokens) > self._room:
            return
        span, known = self._walked(tokens, owner)
        self._complete(span, cache, row, len(tokens) - known)
        self._use(span)
        self._shrink(self._room - (len(tokens) - known))  # before more is copied
        if known < len(tokens):
            more = list(tokens[known:])
            states = [_copied(layer, row, len(more), 0) for layer in cache.layers]
            span.behind[more[0]] = added = _Span(more, states, span)
            self.tokens += len(more)
            span = added
        self._use(span)

    def usable(self, prompt: Sequence[int], most: int, owner: int = 0) -> int:
        """How many of the first `most` tokens need not be computed."""
        if not self.tokens:
            return 0
        path, known = self._path(prompt[:most], owner)
        windows = {window for window in self._windows if window is not None}
        usable = known
        while (least := min((self._usable_in(path, usable, one) for one in windows), default=usable)) < usable:
            usable = least
        return usable

    def begin(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], owners: Sequence[int] | None = None
    ) -> GrowingCache:
        """A cache with a row for each prompt, which holds its first tokens: as many as usable() says, or none.

        Args:
            owners: of the prompts; else all have owner 0.
        """
        cache = GrowingCache(self._config)
        columns = max(lengths)
        if columns == 0:
            return cache
        rows = zip(prompts, lengths, owners or [0] * len(prompts), strict=True)
        paths = [self._path(prompt[:length], owner)[0] for prompt, length, owner in rows]
        over = [sum(len(one.tokens) for one in path) - length for path, length in zip(paths, lengths, strict=True)]
        for path in paths:
            self._use(path[-1] if path else None)
        layers: list[Any] = cache.layers
        for number, layer in enumerate(layers):
            window = self._windows[number]
            held = columns if window is None else min(columns, window)
            spans = [[span.states[number] for span in path] for path in paths]
            _fill(layer, spans, over, [min(length, held) for length in lengths], held)
            if window is not None:
                layer.cumulative_length = columns  # those that have left it count, too
        return cache

    def bound(self, tokens_max: int) -> None:
        """Keeps no more than this from now on, and lets go what is more."""
        self._room = max(0, min(self._tokens_max, tokens_max))
        self._shrink(self._room)

    def _shrink(self, tokens_max: int) -> None:
        while self.tokens > tokens_max:
            span, _ = self._spans.popitem(last=False)
            assert not span.behind
            assert span.before is not None
            del span.before.behind[span.tokens[0]]
            self.tokens -= len(span.tokens)

    def _path(self, tokens: Sequence[int], owner: int) -> tuple[list[_Span], int]:
        """The spans that begin with what is known of `tokens`, and how many these are. The last may go on."""
        path: list[_Span] = []
        span, known = self._root(owner), 0
        while known < len(tokens) and (following := span.behind.get(tokens[known])) is not None:
            common = _common(following.tokens, tokens[known : known + len(following.tokens)])
            known += common
            path.append(following)
            if common < len(following.tokens):
                break
            span = following
        return path, known

    def _usable_in(self, path: list[_Span], known: int, window: int) -> int:
        """How many of the first `known` tokens of a path can be continued in layers with a window of past tokens."""
        layer = self._windows.index(window)
        usable = begin = end = 0  # of a run of tokens that are held
        position = 0
        for span in path:
            position += len(span.tokens)
            first = position - span.states[layer][0].shape[-2]
            begin = begin if first <= end else first
            end = position
            stop = min(end, known)
            if stop > begin and (begin == 0 or stop - begin >= window):
                usable = stop
        return usable

    def _root(self, owner: int) -> _Span:
        return self._roots.setdefault(owner, _Span([], [], None))

    def _walked(self, tokens: Sequence[int], owner: int) -> tuple[_Span, int]:
        """The span that ends with what is known of `tokens`, cut there if need be, and how many these are."""
        path, known = self._path(tokens, owner)
        if not path:
            return self._root(owner), 0
        last = path[-1]
        over = sum(len(span.tokens) for span in path) - known
        return (self._cut(last, len(last.tokens) - over) if over else last), known

    def _complete(self, span: _Span, cache: GrowingCache, row: int, behind: int) -> None:
        """Adds to layers with a window what a span and those before it do not hold, and a row of `cache` does.

        Args:
            behind: tokens of the row that follow the span.
        """
        windows = [layer for layer, window in enumerate(self._windows) if window is not None]
        at: _Span | None = span
        while windows and at is not None and at.before is not None:
            for layer in windows:
                there: Any = cache.layers[layer]
                if min(len(at.tokens), there.keys.shape[-2] - behind) > at.states[layer][0].shape[-2]:
                    at.states[layer] = _copied(there, row, len(at.tokens), behind)
            behind += len(at.tokens)
            at = at.before

    def _cut(self, span: _Span, length: int) -> _Span:
        """Makes two of a span. Returns the first, of `length` tokens."""
        before, rest = span.before, len(span.tokens) - length
        assert before is not None
        first = _Span(span.tokens[:length], [_halves(pair, rest)[0] for pair in span.states], before)
        before.behind[span.tokens[0]] = first
        span.states = [_halves(pair, rest)[1] for pair in span.states]
        span.tokens, span.before = span.tokens[length:], first
        first.behind[span.tokens[0]] = span
        return first

    def _use(self, span: _Span | None) -> None:
        while span is not None and span.before is not None:
            self._spans[span] = None
            self._spans.move_to_end(span)
            span = span.before


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    if list(one) == list(other):
        return len(one)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _copied(layer: Any, row: int, tokens: int, behind: int) -> tuple[Tensor, Tensor]:
    """Copies of keys and values of a row before its last `behind` ones, as far as the layer holds them."""
    end = max(0, layer.keys.shape[-2] - behind)
    begin = max(0, end - tokens)
    return layer.keys[row, :, begin:end].clone(), layer.values[row, :, begin:end].clone()


def _halves(pair: tuple[Tensor, Tensor], rest: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Keys and values without their last `rest` tokens, and those."""
    cut = max(0, pair[0].shape[-2] - rest)
    keys, values = pair
    return (keys[:, :cut].clone(), values[:, :cut].clone()), (keys[:, cut:].clone(), values[:, cut:].clone())


def _fill(
    layer: Any, rows: list[list[tuple[Tensor, Tensor]]], over: list[int], counts: list[int], columns: int
) -> None:
    """Writes the last `counts` tokens of each row's spans, without `over` at their end, to the end of its columns."""
    known = next(spans for spans in rows if spans)[0]
    like = [states.new_empty(len(rows), states.shape[0], 0, states.shape[2]) for states in known]
    rooms = layer.room_for(columns, *like)
    for which, room in enumerate(rooms):
        for row, spans in enumerate(rows):
            end, missing, skipped = columns, counts[row], over[row]
            for states in reversed([pair[which] for pair in spans]):
                stop = states.shape[-2] - skipped
                count = min(stop, missing)
                if count > 0:
                    room[row, :, end - count : end] = states[:, stop - count : stop]
                    end, missing = end - count, missing - count
                skipped = 0
            assert missing == 0
            room[row, :, :end] = 0
    layer.add_written(columns)
