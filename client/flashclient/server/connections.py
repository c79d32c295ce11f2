"""Connections of clients that send nothing, or slowly, and those that are open when the server is told to stop."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol  # whatever else is installed

from flashclient.server.problems import Problem

REQUEST_S = 30.0  # within which the head of a request must have come; a server has a bounded number of connections
CONNECTIONS_MAX = 512
BUSY = Problem(503, f"{CONNECTIONS_MAX} connections are open already: try again later", code="unavailable")
TOO_LARGE = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
HEAD_BYTES_MAX = 64 << 10  # of a request
STOPPING_S = 5  # for answers under way, when the server is told to stop once
POLL_S = 0.05  # how often it then looks whether it was told twice
ENDING_S = 3  # for telling the clients of those that take longer


class AnsweringServer(uvicorn.Server):
    """uvicorn's own, which ends answers that outlast its stop with an error that says so.

    At a second signal it ends them at once; uvicorn's own would break them off, with a traceback of each.

    Args:
        end: ends them.
    """

    def __init__(self, config: uvicorn.Config, end: Callable[[], object]) -> None:
        super().__init__(config)
        self._end = end
        self._hurries = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without raising the signal again, so that the client is closed in order."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._hurries = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        async def end() -> None:
            until_s = time.monotonic() + STOPPING_S
            while not self._hurries and time.monotonic() < until_s:
                await asyncio.sleep(POLL_S)
            self._end()
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # its traceback for those who do not read

        ending = asyncio.ensure_future(end())
        await super().shutdown(sockets)
        ending.cancel()


class PatientProtocol(H11Protocol):
    """uvicorn's own, which closes a connection that has no request for REQUEST_S. Answers take as long as they need.

    More connections than CONNECTIONS_MAX get status 503, those that were there before go on.
    """

    transport: Any
    cycle: Any

    def send_400_response(self, msg: str) -> None:
        """Other bytes than a request of HTTP, or one that contradicts itself. Told in the shape of all errors."""
        message = "these bytes are no valid HTTP request; the server reads HTTP, not HTTPS, which is a proxy's work"
        problem = Problem(HTTPStatus.BAD_REQUEST, message)
        cause = sys.exception()
        if isinstance(cause, h11.RemoteProtocolError) and cause.error_status_hint == TOO_LARGE:
            problem = Problem(TOO_LARGE, f"the head of the request is larger than {HEAD_BYTES_MAX >> 10} KiB")
        body = json.dumps(problem.as_dict()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        status = HTTPStatus(problem.status)
        response = h11.Response(status_code=status, headers=headers, reason=status.phrase.encode())
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: clients of Java ask each server for HTTP/2, and are answered as if they had not."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS_MAX:
            self.app: Any = JSONResponse(BUSY.as_dict(), BUSY.status, {**BUSY.headers, "Connection": "close"})
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
