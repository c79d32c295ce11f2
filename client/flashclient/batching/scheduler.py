"""Which sequences advance in a step. One thread runs the model; requests come from any thread.

Sequences join and leave between steps. The prompt of a new one is computed in chunks, one between two steps of the
others, so that nobody waits for a long prompt; short prompts share a chunk. (One that rotates by the factors of long
texts is one chunk.) What a request gets does not depend on the others: a row of a pass is the same, bit for bit,
whatever is beside it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flashclient.batching.batch import Batch, feed
from flashclient.batching.bounds import CACHE_TOKENS_MAX, KEPT_TOKENS_MAX, SEQUENCES_MAX, WAITING_MAX
from flashclient.batching.kept_file import KeptFile
from flashclient.batching.kept_prefixes import KeptPrefixes
from flashclient.batching.request import TextRequest
from flashclient.batching.step_order import StepOrder
from flashclient.errors import BusyError, FlashClientError, ModelError, OptionError
from flashclient.kernels.growing_cache import GrowingCache
from flashclient.model.loaded import LoadedModel
from flashclient.torch_state import on_cpu

CHUNK_TOKENS = 256  # of a prompt
# Statuses of weightd's answers that each request would get: the model is gone, or another import, or not for this user.
LASTING = ("NOT_FOUND", "FAILED_PRECONDITION", "PERMISSION_DENIED")

logger = logging.getLogger("flashclient.server")


class _Prompts:
    """Requests whose prompts are being computed: some short ones in one pass, or a long one in chunks."""

    def __init__(self, loaded: LoadedModel, requests: list[TextRequest], kept: KeptPrefixes) -> None:
        self.requests = requests
        self.lengths = [len(request.tokens) for request in requests]
        self._loaded = loaded
        self._kept = kept
        # Tokens that rotate by long factors are computed in one pass, which is as long as the sequence. What is kept
        # was rotated by short ones.
        self.are_long = loaded.is_long(max(self.lengths))
        if self.are_long:
            self._done = [0] * len(requests)
        else:
            for request in requests:
                kept.fetch(request.tokens, len(request.tokens) - 1, request.owner)
            self._done = starts_of(requests, kept)
        owners = [request.owner for request in requests]
        self.cache = kept.begin([request.tokens for request in requests], self._done, owners)
        for request, start in zip(requests, self._done, strict=True):
            if request.made == 0:
                request.kept_tokens = start

    @property
    def tokens(self) -> int:
        """That its cache has room for."""
        return len(self.requests) * max(self.lengths)

    def advance(self) -> Tensor | None:
        """Computes the next chunk. At the end returns the logits [requests, vocabulary]."""
        pairs = zip(self.requests, self._done, strict=True)
        most = max(self.lengths) if self.are_long else CHUNK_TOKENS
        chunks = [request.tokens[done : done + most] for request, done in pairs]
        steps = self._loaded.built.steps
        if steps is not None:
            steps.begin(max(self.lengths), None)
        try:
            logits = feed(self._loaded.model, chunks, self.cache, self._done)
        finally:
            if steps is not None:
                steps.end()
        self._done = [done + len(chunk) for done, chunk in zip(self._done, chunks, strict=True)]
        for row, request in enumerate(self.requests if not self.are_long else ()):
            self._kept.keep(request.tokens[: self._done[row]], self.cache, row, request.owner)
        return logits if self._done == self.lengths else None


def starts_of(requests: Sequence[TextRequest], kept: KeptPrefixes) -> list[int]:
    """How many tokens of each prompt are not computed, where all are computed in one pass.

    Rows of a pass that continue what is in a cache are of one length. If they cannot be, all begin at 0.
    """
    lengths = [len(request.tokens) for request in requests]
    known = [kept.usable(one.tokens, length - 1, one.owner) for one, length in zip(requests, lengths, strict=True)]
    computed = max(length - one for length, one in zip(lengths, known, strict=True))
    starts = [length - computed for length in lengths]
    usable = all(
        start >= 0 and kept.usable(request.tokens, start, request.owner) == start
        for request, start in zip(requests, starts, strict=True)
    )
    return starts if usable else [0] * len(requests)


class Scheduler:
    """Runs requests on a loaded model. Its thread ends with close().

    Args:
        sequences_max: that advance together, from 1 to 16.
        waiting_max: further requests that may wait.
        cache_tokens_max: of all sequences that advance together, each counted as long as the longest may become. A
            longer sequence advances alone.
        kept_tokens_max: of sequences that have ended, kept for prompts that begin alike; fewer where those that advance
            need the room.
        order: of steps, shared with the schedulers of other models.
        kept_file: for what is kept and has no room in memory.
        before_step: called with the model's turn before each step.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sequences_max: int = SEQUENCES_MAX,
        waiting_max: int = WAITING_MAX,
        cache_tokens_max: int = CACHE_TOKENS_MAX,
        kept_tokens_max: int = KEPT_TOKENS_MAX,
        order: StepOrder | None = None,
        kept_file: KeptFile | None = None,
        before_step: Callable[[], None] | None = None,
    ) -> None:
        assert 1 <= sequences_max <= SEQUENCES_MAX
        _check_cache(loaded)
        self._loaded = loaded
        # A model with states of another kind than keys and values runs one sequence at a time.
        self._sequences_max = sequences_max if GrowingCache(loaded.model.config).holds_tokens else 1
        self._waiting_max = waiting_max
        self._cache_tokens_max = cache_tokens_max
        kept_max = min(kept_tokens_max, cache_tokens_max)
        self._kept = KeptPrefixes(loaded.model.config, kept_max, kept_file, loaded.kv_dtype)
        self.kept_file = kept_file
        self._order = StepOrder() if order is None else order
        self._before_step = before_step
        self._changed = threading.Condition()
        self._waiting: deque[TextRequest] = deque()
        self._closing = False
        self._batch = Batch(loaded)
        self._running: list[tuple[TextRequest, int]] = []  # by row: the request, and its last token
        self._are_long = False  # those that run, or ran last
        self._prompts: _Prompts | None = None
        self.steps = self.made_tokens = 0
        self._refused: str | None = None  # by weightd: why it serves the model no more
        self._thread = threading.Thread(target=self._run, name="flashclient-scheduler", daemon=True)
        self._thread.start()

    def submit(self, *requests: TextRequest) -> None:
        """Queues requests that belong together: all of them or none.

        Raises:
            OptionError: there are more than may ever wait.
            BusyError: too many wait already.
            FlashClientError: it is closed.
        """
        if len(requests) > self._waiting_max:
            raise OptionError(f"{len(requests)} sequences at once, and {self._waiting_max} may wait: ask for fewer")
        with self._changed:
            if self._closing:
                raise FlashClientError("the server is stopping: try again later")
            if len(self._waiting) + len(requests) > self._waiting_max:
                raise BusyError(f"{len(self._waiting)} requests wait already: try again later")
            self._waiting.extend(requests)
            self._changed.notify()

    @property
    def load(self) -> tuple[int, int]:
        """The sequences that advance, and those that wait."""
        prompts = self._prompts
        return len(self._running) + (0 if prompts is None else len(prompts.requests)), len(self._waiting)

    @property
    def kept_tokens(self) -> int:
        """The tokens whose keys and values are kept in memory for later prompts."""
        return self._kept.tokens

    @property
    def fetched_tokens(self) -> int:
        """The tokens whose keys and values came back from the file."""
        return self._kept.fetched_tokens

    def check_runs(self) -> None:
        """Raises FlashClientError if its thread has ended, or if weightd has the model no more, or another import."""
        if not self._thread.is_alive():
            raise FlashClientError("the model computes no more requests: start the server again")
        if self._refused is not None:
            raise FlashClientError(f"start the server again: {self._refused}")

    def stop(self) -> None:
        """Fails all requests after the step under way, and does not wait for it."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self) -> None:
        """Fails all requests, and waits for the thread."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._await_work():
                try:
                    with self._order.turn(), self._loaded.turns.taken(), on_cpu():
                        if self._before_step is not None:
                            self._before_step()
                        self._step()
                    self._refused = None
                except Exception as error:  # of the daemon or the device: what runs is lost, what waits is not
                    _log(error)
                    self._note_refusal(error)
                    self._fail_running(error)
        finally:
            with self._changed:
                self._closing = True
                waiting = [*self._waiting]
                self._waiting.clear()
            self._fail_running(FlashClientError("the server is stopping"))
            for request in waiting:
                request.fail(FlashClientError("the server is stopping"))

    def _await_work(self) -> bool:
        """Waits until there is something to compute. False when it is closed."""
        if not (self._waiting or self._running or self._prompts or self._closing):
            self._idle()
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
        return not self._closing

    def _idle(self) -> None:
        """Gives back what the model has leased, while there is nothing to do."""
        try:
            with self._loaded.turns.taken():
                self._loaded.built.ffn.idle()
        except Exception as error:  # weightd is gone, and its leases are, too
            _log(error)
            self._note_refusal(error)

    def _note_refusal(self, error: Exception) -> None:
        """Notes an error that comes again with each request. Others may be over, as when weightd starts again."""
        if isinstance(error, FlashClientError) and error.status in LASTING:
            self._refused = str(error)

    def _step(self) -> None:
        """A chunk of prompts, and a token of each sequence."""
        self._drop_cancelled()
        self._next_prompts()
        self._bound_kept()
        if self._prompts is not None:
            logits = self._prompts.advance()
            if logits is not None:
                self._join(self._prompts, logits)
        self._begin_again()
        if not self._running:
            return
        logits = self._batch.step([token for _, token in self._running])
        self.steps += 1
        self.made_tokens += len(self._running)
        self._take(logits)

    def _begin_again(self) -> None:
        """Sequences that have become long wait with all of their tokens: other factors rotate these from now on."""
        if self._are_long:
            return
        rows = {row for row, (request, _) in enumerate(self._running) if self._is_long(request)}
        grown = [self._running[row][0] for row in sorted(rows)]
        self._leave(rows)
        with self._changed:
            self._waiting.extendleft(reversed(grown))

    def _is_long(self, request: TextRequest) -> bool:
        return self._loaded.is_long(len(request.tokens))

    def _bound_kept(self) -> None:
        under_way = self._batch.tokens + (self._prompts.tokens if self._prompts is not None else 0)
        self._kept.bound(self._cache_tokens_max - under_way)

    def _join(self, prompts: _Prompts, logits: Tensor) -> None:
        rows = len(self._running)
        self._are_long = prompts.are_long
        tokens = [_taken(request, logits[row]) for row, request in enumerate(prompts.requests)]
        self.made_tokens += len(tokens)
        self._batch.join(prompts.cache, prompts.lengths)
        self._running += [(request, token or 0) for request, token in zip(prompts.requests, tokens, strict=True)]
        self._prompts = None
        self._leave({rows + row for row, token in enumerate(tokens) if token is None})

    def _take(self, logits: Tensor) -> None:
        """Picks the next token of each row, and lets those go whose text has ended."""
        ended = set()
        for row, (request, _) in enumerate(self._running):
            token = _taken(request, logits[row])
            if token is None:
                ended.add(row)
            else:
                self._running[row] = (request, token)
        self._leave(ended)

    def _leave(self, rows: set[int]) -> None:
        # In other modes a prompt is computed with more neurons than what was made.
        if self._loaded.mode == "exact" and not self._are_long:
            self._bound_kept()
            for row in rows:
                request = self._running[row][0]
                self._batch.keep(row, request.tokens, request.owner, self._kept)
        self._batch.leave(rows)
        self._running = [one for row, one in enumerate(self._running) if row not in rows]

    def _next_prompts(self) -> None:
        """The next request, and those after it that fit into the same chunk."""
        with self._changed:
            chosen: list[TextRequest] = []
            while self._prompts is None and self._waiting and self._fits(chosen):
                request = self._waiting.popleft()
                chosen += [] if request.cancelled else [request]
        if chosen:
            try:
                self._prompts = _Prompts(self._loaded, chosen, self._kept)
            except Exception as error:  # they are in no list, so nobody else tells them
                _log(error)
                for request in chosen:
                    request.fail(error)

    def _fits(self, chosen: list[TextRequest]) -> bool:
        """Whether the first of those that wait may begin beside those that run and were chosen."""
        beside = [request for request, _ in self._running] + chosen
        together = (*chosen, self._waiting[0])
        rows = len(beside) + 1
        columns = max(len(request.prompt) + request.tokens_max for request in (*beside, self._waiting[0]))
        in_memory = not beside or rows * columns <= self._cache_tokens_max
        long = self._is_long(self._waiting[0])
        alike = all(long == self._is_long(one) for one in chosen) and (not self._running or long == self._are_long)
        in_one_pass = not chosen or (not long and self._in_a_chunk(together))
        return rows <= self._sequences_max and in_memory and alike and in_one_pass

    def _in_a_chunk(self, requests: Sequence[TextRequest]) -> bool:
        starts = starts_of(requests, self._kept)
        computed = max(len(request.tokens) - start for request, start in zip(requests, starts, strict=True))
        return len(requests) * computed <= CHUNK_TOKENS

    def _drop_cancelled(self) -> None:
        if self._prompts is not None and all(request.cancelled for request in self._prompts.requests):
            self._prompts = None
        self._leave({row for row, (request, _) in enumerate(self._running) if request.cancelled})

    def _fail_running(self, error: Exception) -> None:
        failed = [request for request, _ in self._running]
        failed += self._prompts.requests if self._prompts is not None else []
        self._running, self._prompts = [], None
        self._batch.clear()
        for request in failed:
            request.fail(error)


def _check_cache(loaded: LoadedModel) -> None:
    """Raises ModelError for a class that does not take the caches of transformers."""
    kind: Any = type(loaded.model)
    if not kind._supports_default_dynamic_cache():
        raise ModelError(f"{kind.__name__} has a cache of its own, which no server can share: use flashclient generate")


def _taken(request: TextRequest, logits: Tensor) -> int | None:
    """The next token. None where the text has ended, or cannot go on; others do."""
    try:
        return request.take(logits)
    except Exception as error:
        _log(error)
        request.fail(error)
        return None


def _log(error: Exception) -> None:
    """What the library raises for faults of the daemon goes to the client; the rest nobody expects."""
    if not isinstance(error, FlashClientError):
        logger.error("a request failed", exc_info=error)
