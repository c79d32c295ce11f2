"""Calls of gRPC in threads of their own, so that an interrupt (Ctrl-C) does no harm to gRPC.

Python runs signal handlers in the main thread, between any two steps of its code. gRPC's code in Python holds locks of
threading.Condition. A handler that raises there leaves such a lock locked, and later calls wait for ever. So the main
thread only waits for the answer, in a queue that is written in C.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")
Outcome = tuple[Any, BaseException | None]


class CallThreads:
    """Makes calls that the main thread asks for. Other threads, and a child after fork(), make theirs themselves.

    So does an interpreter that is ending: its other threads run no more, and to start one would wait for ever.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._idle: deque[_CallThread] = deque()

    def call(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """The result of the function, or its error. An interrupt ends the waiting, not the call."""
        if not self._interruptible():
            return function(*args, **kwargs)
        thread = self._idle.pop() if self._idle else _CallThread()
        result, error = thread.outcome(partial(function, *args, **kwargs))  # an interrupted thread is not used again
        self._idle.append(thread)
        if error is not None:
            try:
                raise error
            finally:
                del error, thread  # its traceback refers to this frame
        made: Result = result
        return made

    def drop(self, last: list[Any]) -> None:
        """Empties the list in a thread, where the destructors of what only it holds then run."""
        if self._interruptible():
            with suppress(RuntimeError):  # the interpreter ends: it starts no thread
                (self._idle[-1] if self._idle else _CallThread()).begin(last.clear)

    def _interruptible(self) -> bool:
        if sys.is_finalizing():
            return False
        return threading.current_thread() is threading.main_thread() and os.getpid() == self._process

    def close(self) -> None:
        """Ends the threads, those with a call after it."""
        self._idle.clear()


class _CallThread:
    """A thread that makes one call after another, until the last reference to this object is gone."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        threading.Thread(target=_make_calls, args=(self._calls,), name="flashclient-call", daemon=True).start()

    def outcome(self, call: Callable[[], Any]) -> Outcome:
        self._calls.put(partial(_answer, call, self._outcomes))
        return self._outcomes.get()

    def begin(self, call: Callable[[], Any]) -> None:
        self._calls.put(call)

    def __del__(self) -> None:
        self._calls.put(None)


def _make_calls(calls: SimpleQueue[Callable[[], Any] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # before the next wait: it may hold the last reference to an answer


def _answer(call: Callable[[], Any], outcomes: SimpleQueue[Outcome]) -> None:
    try:
        outcomes.put((call(), None))
    except BaseException as error:  # raised again in the thread that waits
        outcomes.put((None, error))


class CalledStub:
    """The calls of `stub`, made by `threads`."""

    def __init__(self, stub: Any, threads: CallThreads) -> None:
        for name, method in vars(stub).items():
            if callable(method):
                setattr(self, name, partial(_call, threads, method))


def _call(threads: CallThreads, method: Callable[..., Any], request: Any, **options: Any) -> Any:
    answer = threads.call(method, request, **options)
    return _Responses(answer, threads) if hasattr(answer, "__next__") else answer


class _Responses:
    """The responses of a streaming call. They are cancelled when the last reference to this object is gone."""

    def __init__(self, responses: Iterator[Any], threads: CallThreads) -> None:
        self._threads = threads
        self._last = [responses]

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._threads.call(next, self._last[0])

    def __del__(self) -> None:
        self._threads.drop(self._last)
