"""Connections of clients that send nothing, or slowly, and those that are open when the server is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol  # whatever else is installed

REQUEST_S = 30.0  # within which the head of a request must have come; a server has a bounded number of connections
STOPPING_S = 5  # for answers under way, when the server is told to stop
ENDING_S = 3  # for telling the clients of those that take longer


class AnsweringServer(uvicorn.Server):
    """uvicorn's own, which ends answers that outlast its stop with an error that says so.

    Args:
        end: ends them.
    """

    def __init__(self, config: uvicorn.Config, end: Callable[[], object]) -> None:
        super().__init__(config)
        self._end = end

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without raising the signal again, so that the client is closed in order."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        def end() -> None:
            self._end()
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # its traceback for those who do not read

        ending = asyncio.get_running_loop().call_later(STOPPING_S, end)
        await super().shutdown(sockets)
        ending.cancel()


class PatientProtocol(H11Protocol):
    """uvicorn's own, which closes a connection that has no request for REQUEST_S. Answers take as long as they need."""

    transport: Any
    cycle: Any

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._seen: Any = None
        self._watch()

    def _watch(self) -> None:
        asyncio.get_running_loop().call_later(REQUEST_S, self._close_if_silent)

    def _close_if_silent(self) -> None:
        """Closes it if there was no request when this was called before, nor since."""
        if self.transport.is_closing():
            return
        answered = self.cycle is None or self.cycle.response_complete
        if answered and self.cycle is self._seen:
            self.transport.close()
            return
        self._seen = self.cycle if answered else object()
        self._watch()
