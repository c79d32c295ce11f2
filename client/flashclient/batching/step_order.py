"""Whose step is next, where several models run in one process: they take turns, one step at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StepOrder:
    """Gives out turns in the order in which they are asked for. So no model waits for two steps of another."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._given = 0
        self._ended = 0

    @property
    def waiting(self) -> int:
        """The turns that were asked for and have not begun."""
        return max(0, self._given - self._ended - 1)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The caller's turn; waits for those that were asked for before."""
        with self._changed:
            mine, self._given = self._given, self._given + 1
            self._changed.wait_for(lambda: self._ended == mine)
        try:
            yield
        finally:
            with self._changed:
                self._ended += 1
                self._changed.notify_all()
