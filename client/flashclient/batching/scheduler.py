"""Which sequences advance in a step. One thread runs the model; requests come from any thread.

Sequences join and leave between steps. The prompt of a new one is computed in chunks, one between two steps of the
others, so that nobody waits for a long prompt. What a request gets does not depend on the others: a row of a pass is
the same, bit for bit, whatever is beside it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from flashclient.batching.batch import Batch, can_join, feed
from flashclient.batching.request import TextRequest
from flashclient.errors import BusyError, FlashClientError
from flashclient.kernels.growing_cache import GrowingCache
from flashclient.model.loaded import LoadedModel
from flashclient.torch_state import on_cpu

SEQUENCES_MAX = 16  # rows that a kernel computes at once
WAITING_MAX = 64
CHUNK_TOKENS = 256  # of a prompt


class _Prompt:
    """A request whose prompt is being computed."""

    def __init__(self, loaded: LoadedModel, request: TextRequest) -> None:
        self.request = request
        self.cache = GrowingCache(loaded.model.config)
        self._loaded = loaded
        self._done = 0

    def advance(self, tokens: int) -> bool:
        """Computes the next chunk. At the end picks the first token, and returns True."""
        prompt = self.request.prompt
        chunk = list(prompt[self._done : self._done + tokens])
        steps = self._loaded.built.steps
        if steps is not None:
            steps.begin(len(prompt), None)
        try:
            self.logits = feed(self._loaded.model, [chunk], self.cache)[0]
        finally:
            if steps is not None:
                steps.end()
        self._done += len(chunk)
        return self._done == len(prompt)


class Scheduler:
    """Runs requests on a loaded model. Its thread ends with close().

    Args:
        sequences_max: that advance together, from 1 to 16.
        waiting_max: further requests that may wait.
    """

    def __init__(self, loaded: LoadedModel, sequences_max: int = SEQUENCES_MAX, waiting_max: int = WAITING_MAX) -> None:
        assert 1 <= sequences_max <= SEQUENCES_MAX
        self._loaded = loaded
        self._sequences_max = sequences_max
        self._waiting_max = waiting_max
        self._changed = threading.Condition()
        self._waiting: deque[TextRequest] = deque()
        self._closing = False
        self._batch = Batch(loaded)
        self._running: list[tuple[TextRequest, int]] = []  # by row: the request, and its last token
        self._prompt: _Prompt | None = None
        self.steps = 0
        self._thread = threading.Thread(target=self._run, name="flashclient-scheduler", daemon=True)
        self._thread.start()

    def submit(self, *requests: TextRequest) -> None:
        """Queues requests that belong together: all of them or none.

        Raises:
            BusyError: too many wait already.
            FlashClientError: it is closed.
        """
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
        return len(self._running) + (self._prompt is not None), len(self._waiting)

    def close(self) -> None:
        """Fails all requests, and waits for the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._await_work():
            try:
                with self._loaded.turns.taken(), on_cpu():
                    self._step()
            except Exception as error:  # of the daemon or the device: what runs is lost, what waits is not
                self._fail_running(error)
        self._fail_running(FlashClientError("the server is stopping"))
        while self._waiting:
            self._waiting.popleft().fail(FlashClientError("the server is stopping"))

    def _await_work(self) -> bool:
        """Waits until there is something to compute. False when it is closed."""
        with self._changed:
            if not (self._waiting or self._running or self._prompt or self._closing):
                with self._idle():
                    self._changed.wait_for(lambda: self._waiting or self._closing)
            return not self._closing

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """Gives back what the model has leased, while there is nothing to do."""
        try:
            with self._loaded.turns.taken():
                self._loaded.built.ffn.idle()
        except FlashClientError:  # weightd is gone, and its leases are, too
            pass
        yield

    def _step(self) -> None:
        """A chunk of a prompt, and a token of each sequence."""
        self._drop_cancelled()
        self._next_prompt()
        if self._prompt is not None and self._prompt.advance(CHUNK_TOKENS):
            prompt, self._prompt = self._prompt, None
            self._join(prompt)
        if not self._running:
            return
        logits = self._batch.step([token for _, token in self._running])
        self.steps += 1
        for row in reversed(range(len(self._running))):  # from the end, so that rows keep their numbers
            request, _ = self._running[row]
            token = request.take(logits[row])
            if token is None:
                self._leave(row)
            else:
                self._running[row] = (request, token)

    def _join(self, prompt: _Prompt) -> None:
        token = prompt.request.take(prompt.logits)
        if token is not None:
            self._batch.join(prompt.cache)
            self._running.append((prompt.request, token))

    def _leave(self, row: int) -> None:
        del self._running[row]
        self._batch.leave(row)

    def _next_prompt(self) -> None:
        with self._changed:
            while self._waiting and self._waiting[0].cancelled:
                self._waiting.popleft()
            if self._prompt is None and self._waiting and self._has_room():
                self._prompt = _Prompt(self._loaded, self._waiting.popleft())

    def _has_room(self) -> bool:
        """Whether one more may run. A model with states of another kind runs one sequence at a time."""
        joins = can_join(GrowingCache(self._loaded.model.config))
        return len(self._running) < (self._sequences_max if joins else 1)

    def _drop_cancelled(self) -> None:
        if self._prompt is not None and self._prompt.request.cancelled:
            self._prompt = None
        for row in reversed(range(len(self._running))):
            if self._running[row][0].cancelled:
                self._leave(row)

    def _fail_running(self, error: Exception) -> None:
        failed = [request for request, _ in self._running]
        failed += [self._prompt.request] if self._prompt is not None else []
        self._running, self._prompt = [], None
        self._batch.clear()
        for request in failed:
            request.fail(error)
