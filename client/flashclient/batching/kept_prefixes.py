"""Keys and values of earlier prompts and answers, for prompts that begin with the same tokens.

They lie in trees of spans of tokens, one for each owner: what is reused tells that somebody has sent the same, by its
count and its time. A conversation is a path from the root; conversations with the same beginning share its spans. A
token's keys and values depend on the tokens before it alone, so what is reused changes no bit.

The least recently used span goes first. A span is used whenever one behind it is, so those behind it have gone before.
It goes to a file, if there is one, and comes back when a prompt begins with its tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import Tensor

from flashclient.batching.kept_file import KeptFile, Pages, States
from flashclient.kernels.growing_cache import GrowingCache, GrowingWindowLayer
from weightd_proto.modes import KV_PLAIN


@dataclass(eq=False)
class _Span:
    """Tokens that follow each other.

    Attributes:
        states: in memory; a layer with a window may hold fewer than all tokens: the last ones.
        place: of the same states in the file.
    """

    tokens: list[int]
    states: States | None
    before: _Span | None
    behind: dict[int, _Span] = field(default_factory=dict)  # by their first token
    place: Pages | None = None

    @property
    def loaded(self) -> States:
        assert self.states is not None
        return self.states


class KeptPrefixes:
    """Not safe for several threads.

    Args:
        config: of the model.
        tokens_max: that are kept in memory. Nothing is kept if the model's cache holds states of another kind.
        file: for those that go.
        kv_dtype: of keys and values, one of KV_DTYPES.
    """

    def __init__(self, config: Any, tokens_max: int, file: KeptFile | None = None, kv_dtype: str = KV_PLAIN) -> None:
        self._config = config
        self._kv_dtype = kv_dtype
        self._file = file
        layers: list[Any] = GrowingCache(config).layers
        self._holds_tokens = GrowingCache(config).holds_tokens
        self._windows = [one.sliding_window - 1 if isinstance(one, GrowingWindowLayer) else None for one in layers]
        self._tokens_max = self._room = tokens_max
        self._roots: dict[int, _Span] = {}  # by owner
        self._in_memory: OrderedDict[_Span, None] = OrderedDict()  # the least recently used first
        self._in_file: OrderedDict[_Span, None] = OrderedDict()
        self._latest: set[_Span] = set()  # the path that was used last
        self.tokens = 0  # that are kept in memory
        self.fetched_tokens = 0

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
            copied = [_copied(layer, row, len(more), 0) for layer in cache.layers]
            span.behind[more[0]] = added = _Span(more, copied, span)
            self.tokens += len(more)
            span = added
        self._use(span)

    def usable(self, prompt: Sequence[int], most: int, owner: int = 0) -> int:
        """How many of the first `most` tokens need not be computed."""
        if not self.tokens:
            return 0
        path, known = self._path(prompt[:most], owner)
        in_memory = list(takewhile(lambda span: span.states is not None, path))
        return self._usable(in_memory, min(known, _length(in_memory)))

    def fetch(self, prompt: Sequence[int], most: int, owner: int = 0) -> None:
        """Reads back what begins a prompt, so that it is usable."""
        if not self._in_file:
            return
        path, known = self._path(prompt[:most], owner)
        while path and (
            _length(path) - len(path[-1].tokens) >= self._usable(path, known) or _length(path) > self._room
        ):
            known = min(known, _length(path[:-1]))
            path = path[:-1]
        missing = [span for span in path if span.states is None]
        if missing:
            self._use(path[-1])
            self._shrink(self._room - _length(missing))
            for span in missing:
                if not self._read(span):
                    return
                self.fetched_tokens += len(span.tokens)

    def begin(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], owners: Sequence[int] | None = None
    ) -> GrowingCache:
        """A cache with a row for each prompt, which holds its first tokens: as many as usable() says, or none.

        Args:
            owners: of the prompts; else all have owner 0.
        """
        cache = GrowingCache(self._config, self._kv_dtype)
        columns = max(lengths)
        if columns == 0:
            return cache
        rows = zip(prompts, lengths, owners or [0] * len(prompts), strict=True)
        paths = [self._path(prompt[:length], owner)[0] for prompt, length, owner in rows]
        over = [_length(path) - length for path, length in zip(paths, lengths, strict=True)]
        for path in paths:
            self._use(path[-1] if path else None)
        layers: list[Any] = cache.layers
        for number, layer in enumerate(layers):
            window = self._windows[number]
            held = columns if window is None else min(columns, window)
            spans = [[span.loaded[number] for span in path] for path in paths]
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
            span = next(iter(self._in_memory))
            if span.place is None and not self._write(span):
                self._forget(span)
            else:
                self._let_go(span)

    def _write(self, span: _Span) -> bool:
        """Writes a span to the file, where others make room that have not been used for longer."""
        if self._file is None or not self._file.may_hold(span.loaded):
            return False
        while not self._file.has_room(span.loaded):
            oldest = next(iter(self._in_file), None)
            if oldest is None or (oldest.states is None and oldest in self._latest):
                return False
            if oldest.states is None:
                self._forget(oldest)
            else:
                self._unwrite(oldest)
        span.place = self._file.write(span.loaded)
        if span.place is not None:
            self._in_file[span] = None
        return span.place is not None

    def _read(self, span: _Span) -> bool:
        """Brings a span back into memory. One that cannot be read is forgotten, and so are those behind it."""
        assert self._file is not None
        assert span.place is not None
        span.states = self._file.read(span.place)
        if span.states is None:
            self._forget(span)
            return False
        self._in_memory[span] = None
        self.tokens += len(span.tokens)
        return True

    def _brought_back(self, path: list[_Span]) -> bool:
        """Reads the last span of a path. False where it is forgotten instead."""
        last = path[-1]
        if _length(path) > self._room:
            self._forget(last)
            return False
        self._use(last)
        self._shrink(self._room - len(last.tokens))
        return self._read(last)

    def _let_go(self, span: _Span) -> None:
        del self._in_memory[span]
        span.states = None
        self.tokens -= len(span.tokens)

    def _unwrite(self, span: _Span) -> None:
        if span.place is not None and self._file is not None:
            self._file.free(span.place)
            del self._in_file[span]
            span.place = None

    def _forget(self, span: _Span) -> None:
        """Removes a span and all behind it."""
        assert span.before is not None
        del span.before.behind[span.tokens[0]]
        left = [span]
        while left:
            one = left.pop()
            left += one.behind.values()
            self._unwrite(one)
            if one.states is not None:
                self._let_go(one)

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

    def _usable(self, path: list[_Span], known: int) -> int:
        """How many of the first `known` tokens of a path can be continued."""
        windows = {window for window in self._windows if window is not None}
        usable = known
        while (least := min((self._usable_in(path, usable, one) for one in windows), default=usable)) < usable:
            usable = least
        return usable

    def _usable_in(self, path: list[_Span], known: int, window: int) -> int:
        """How many of the first `known` tokens of a path can be continued in layers with a window of past tokens."""
        layer = self._windows.index(window)
        usable = begin = end = 0  # of a run of tokens that are held
        position = 0
        for span in path:
            position += len(span.tokens)
            first = position - _held(span, layer)
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
        over = _length(path) - known
        if not over:
            return last, known
        if last.states is None and not self._brought_back(path):
            assert last.before is not None
            return last.before, known - (len(last.tokens) - over)
        return self._cut(last, len(last.tokens) - over), known

    def _complete(self, span: _Span, cache: GrowingCache, row: int, behind: int) -> None:
        """Adds to layers with a window what a span and those before it do not hold, and a row of `cache` does.

        Args:
            behind: tokens of the row that follow the span.
        """
        windows = [layer for layer, window in enumerate(self._windows) if window is not None]
        at: _Span | None = span
        while windows and at is not None and at.before is not None:
            here = {layer: _in_row(cache.layers[layer], len(at.tokens), behind) for layer in windows}
            more = [layer for layer, held in here.items() if held > _held(at, layer)]
            if at.states is not None:
                for layer in more:
                    at.states[layer] = _copied(cache.layers[layer], row, len(at.tokens), behind)
            elif more and all(held >= _held(at, layer) for layer, held in here.items()):
                at.states = [_copied(layer, row, len(at.tokens), behind) for layer in cache.layers]
                self.tokens += len(at.tokens)
            if more and at.states is not None:
                self._unwrite(at)
            behind += len(at.tokens)
            at = at.before

    def _cut(self, span: _Span, length: int) -> _Span:
        """Makes two of a span. Returns the first, of `length` tokens."""
        self._unwrite(span)
        before, rest = span.before, len(span.tokens) - length
        assert before is not None
        first = _Span(span.tokens[:length], [_halves(pair, rest)[0] for pair in span.loaded], before)
        before.behind[span.tokens[0]] = first
        span.states = [_halves(pair, rest)[1] for pair in span.loaded]
        span.tokens, span.before = span.tokens[length:], first
        first.behind[span.tokens[0]] = span
        return first

    def _use(self, span: _Span | None) -> None:
        self._latest.clear()
        while span is not None and span.before is not None:
            self._latest.add(span)
            for spans, there in ((self._in_memory, span.states), (self._in_file, span.place)):
                if there is not None:
                    spans[span] = None
                    spans.move_to_end(span)
            span = span.before


def _length(path: Sequence[_Span]) -> int:
    return sum(len(span.tokens) for span in path)


def _held(span: _Span, layer: int) -> int:
    """The tokens that a layer of a span holds."""
    if span.states is not None:
        return span.states[layer][0].shape[-2]
    assert span.place is not None
    return span.place.held(layer)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    if list(one) == list(other):
        return len(one)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _in_row(layer: Any, tokens: int, behind: int) -> int:
    """How many of some tokens before the last `behind` ones a layer of a cache holds."""
    return int(max(0, min(tokens, layer.keys.shape[-2] - behind)))


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
