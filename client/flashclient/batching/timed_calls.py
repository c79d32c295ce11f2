"""Calls to a device that may hang: they run on a thread of their own, and nobody waits for one without end."""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable


class TimedCalls:
    """One call at a time. One that got no answer goes on; until it ends, others fail at once.

    Not safe for several threads.

    Args:
        within_s: how long a call may take.
    """

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        self._asked: queue.SimpleQueue[_Timed | None] = queue.SimpleQueue()
        self._last: _Timed | None = None
        # A daemon thread, because a call that hangs must not keep the program from its end.
        self._thread = threading.Thread(target=self._run, name="flashclient-device", daemon=True)

    def __call__(self, call: Callable[[], None]) -> None:
        """Raises what the call raises, and OSError with ETIMEDOUT where it, or still the one before, takes too long."""
        if self.hangs:
            raise OSError(errno.ETIMEDOUT, f"the device has given no answer for {self._within_s:g} s")
        if self._thread.ident is None:
            self._thread.start()
        self._last = last = _Timed(call)
        self._asked.put(last)
        if not last.done.wait(self._within_s):
            raise OSError(errno.ETIMEDOUT, f"the device gave no answer within {self._within_s:g} s")
        if last.error is not None:
            raise last.error

    @property
    def hangs(self) -> bool:
        return self._last is not None and not self._last.done.is_set()

    def close(self) -> None:
        """Ends the thread after the call that runs, for which it does not wait."""
        self._asked.put(None)

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            try:
                asked.call()
            except BaseException as error:  # whoever waits raises it
                asked.error = error
            asked.call = _nothing  # or its memory would live until the next call
            asked.done.set()


class _Timed:
    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call
        self.done = threading.Event()
        self.error: BaseException | None = None


def _nothing() -> None:
    """A call that was made."""
