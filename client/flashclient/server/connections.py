"""Connections of clients that send nothing, or slowly."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

REQUEST_S = 30.0  # within which the head of a request must have come; a server has a bounded number of connections


class PatientProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
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
