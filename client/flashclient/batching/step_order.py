"""Whose step is next, where several models run in one process: they take turns, one step at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StepOrder:
    """Gives out turns by numbered tickets, in the order of asking. So no model waits for two steps of another."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._issued = 0  # tickets
        self._served = 0

    @property
    def waiting(self) -> int:
        """The turns that were asked for and have not begun."""
        return max(0, self._issued - self._served - 1)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The caller's turn; waits for those that were asked for before."""
        with self._changed:
            ticket, self._issued = self._issued, self._issued + 1
            self._changed.wait_for(lambda: self._served == ticket)
        try:
            yield
        finally:
            with self._changed:
                self._served += 1
                self._changed.notify_all()
