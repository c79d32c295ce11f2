"""Whose turn it is: a loaded model serves one process, and one thread at a time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from flashclient.errors import FlashClientError, ForkedError

EXIT_CHECK_S = 0.001
EXIT_S = 10.0  # how long the interpreter's exit waits for other threads to leave the model


class Turns:
    """Who may use a model: the process that loaded it, one thread at a time, until it is closed."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._ending = False  # close() was called: nobody may begin
        self._closed = False
        self._exiting = False
        self._in_pass: set[int] = set()  # threads in a forward pass

    @contextmanager
    def taken(self) -> Iterator[None]:
        """The caller's turn; waits for those of other threads.

        When the interpreter exits, other threads end with SystemExit, which prints nothing.

        Raises:
            ForkedError: another process loaded the model.
            FlashClientError: it is closed.
        """
        self.check()
        with self._lock:
            self.check()
            if self._ending:
                raise FlashClientError("this client is being closed: make a new one")
            try:
                yield
            except Exception:  # at exit the model is closed while the turn uses it, which may raise anything
                if self._exiting:
                    raise SystemExit from None
                raise

    @contextmanager
    def last(self) -> Iterator[None]:
        """The turn that closes the model; waits for a running generation. A second close() may take it again.

        A forked process does not wait, because no generation runs in it.
        """
        self._ending = True
        with self._lock if os.getpid() == self._pid else nullcontext():
            yield

    def watch_passes(self, model: Any) -> None:
        """Checks and notes each forward pass of the module `model`, also one that the user's code starts."""
        model.register_forward_pre_hook(self._begin_pass)
        model.register_forward_hook(lambda *_: self._in_pass.discard(threading.get_ident()), always_call=True)

    def _begin_pass(self, *_: object) -> None:
        self.check()
        self._in_pass.add(threading.get_ident())

    def check(self) -> None:
        """Raises what taken() does."""
        if os.getpid() != self._pid:
            raise ForkedError("this client was made before fork(): make a new one in the child process")
        if self._exiting and self._closed:
            raise SystemExit
        if self._closed:
            raise FlashClientError("this client is closed: make a new one")

    def close(self) -> None:
        self._closed = True

    def exit(self) -> None:
        """Notes that the interpreter exits, while daemon threads may still be generating."""
        self._exiting = True

    def await_exit(self) -> None:
        """At exit, waits for other threads: one in native code when the interpreter ends would crash the process."""
        if not self._exiting:
            return
        give_up_s = time.monotonic() + EXIT_S
        if self._lock.acquire(timeout=EXIT_S):
            self._lock.release()
        while self._others_in_pass() and time.monotonic() < give_up_s:
            time.sleep(EXIT_CHECK_S)

    def _others_in_pass(self) -> bool:
        """Whether other threads are in a pass. An interrupted pass stays noted, so ended threads do not count."""
        alive = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        return not alive.isdisjoint(self._in_pass)
