"""Clients that send nothing or slowly, and templates that loop: their time is bounded."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from fastapi.responses import PlainTextResponse, StreamingResponse
from uvicorn.server import ServerState

from flashclient.errors import OptionError
from flashclient.server import access, connections
from flashclient.server.access import Access
from flashclient.server.connections import HEAD_BYTES_MAX, PatientProtocol
from flashclient.server.deadline import deadline
from flashclient.server.problems import Problem

SOON_S = 0.05
ANSWER_S = 30.0
REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


async def answered(sent: bytes) -> bytes:
    """All that a server answers before it closes the connection."""
    config = uvicorn.Config(PlainTextResponse("Hi"), timeout_keep_alive=3600, log_config=None)
    config.load()
    loop, state = asyncio.get_running_loop(), ServerState()
    server = await loop.create_server(lambda: PatientProtocol(config, state, {}), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(sent)
    try:
        return await asyncio.wait_for(reader.read(), ANSWER_S)
    finally:
        writer.close()
        server.close()


NO_REQUESTS = (b"\x16\x03\x01\x02", b"GET /health\r\n\r\n", REQUEST.replace(b"Host: a", b"Host"))


@pytest.mark.parametrize("sent", NO_REQUESTS)
def test_what_is_no_request_is_told_in_the_shape_of_errors(sent: bytes) -> None:
    head, _, body = asyncio.run(answered(sent)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json")
    assert json.loads(body)["error"]["message"].startswith("these bytes are no valid HTTP request")


def test_a_head_that_is_too_large_is_told_by_its_status() -> None:
    sent = REQUEST.removesuffix(b"\r\n") + b"Cookie: " + b"a" * HEAD_BYTES_MAX
    head, _, body = asyncio.run(answered(sent)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json")
    assert json.loads(body)["error"]["message"] == "the head of the request is larger than 64 KiB"


def test_who_asks_for_http2_is_answered_without_a_line(caplog: pytest.LogCaptureFixture) -> None:
    asked = b"Host: a\r\nConnection: Upgrade, close\r\nUpgrade: h2c"
    assert asyncio.run(answered(REQUEST.replace(b"Host: a", asked))).endswith(b"Hi")
    assert [line for line in caplog.messages if "upgrade" in line] == []


def test_connections_beyond_the_bound_are_told_in_the_shape_of_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 0)
    head, _, body = asyncio.run(answered(REQUEST)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 Service Unavailable")
    assert b"retry-after: 1" in head
    assert "connections are open already" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("sent", [b"", b"GET / HT", REQUEST])
def test_a_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connections, "REQUEST_S", SOON_S)
    assert asyncio.run(answered(sent)).endswith(b"Hi" if sent == REQUEST else b"")


@pytest.mark.parametrize(("stopping_s", "signals"), [(SOON_S, 1), (10 * ANSWER_S, 2)])
def test_answers_that_outlast_a_stop_are_ended(
    monkeypatch: pytest.MonkeyPatch, stopping_s: float, signals: int
) -> None:
    monkeypatch.setattr(connections, "STOPPING_S", stopping_s)

    async def talk() -> bytes:
        ended = asyncio.Event()

        async def endless() -> AsyncIterator[bytes]:
            yield b"begun"
            await ended.wait()
            yield b" and ended"

        config = uvicorn.Config(StreamingResponse(endless()), lifespan="off", log_level="warning")
        server = connections.AnsweringServer(config, ended.set)
        listening = socket.create_server(("127.0.0.1", 0))
        running = asyncio.ensure_future(server.serve([listening]))
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        writer.write(REQUEST)
        await asyncio.wait_for(reader.readuntil(b"begun"), ANSWER_S)
        for _ in range(signals):
            server.handle_exit(signal.SIGINT, None)
        rest = await asyncio.wait_for(reader.read(), ANSWER_S)
        await running
        writer.close()
        return rest

    assert b" and ended\r\n0\r\n" in asyncio.run(talk())


class SlowRequest:
    def __init__(self, **headers: str) -> None:
        self.headers = {"content-type": "application/json"} | headers

    async def stream(self) -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()


def test_a_slow_body_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "BODY_S", SOON_S)
    slow: Any = SlowRequest()
    with pytest.raises(Problem, match="the body has not come within"):
        asyncio.run(Access().read_body(slow))
    huge: Any = SlowRequest(**{"content-length": "9" * 5000})
    with pytest.raises(Problem, match="the body is larger than 8 MiB"):
        asyncio.run(Access().read_body(huge))


def test_python_code_is_interrupted() -> None:
    def loop() -> None:
        while True:
            pass

    with pytest.raises(OptionError, match=r"the template takes longer than 0.05 s"), deadline(SOON_S, "the template"):
        loop()
