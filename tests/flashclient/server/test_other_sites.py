"""Who may ask: those with a key, and without keys this machine, but not the pages of other sites that it shows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from flashclient.errors import OptionError
from flashclient.server.access import Access, read_keys
from flashclient.server.problems import Problem


class Sent:
    """A request with some headers and an empty object."""

    def __init__(self, **headers: str) -> None:
        self.headers = headers

    async def stream(self) -> AsyncIterator[bytes]:
        yield b"\xef\xbb\xbf"
        yield b"{}"


@pytest.mark.parametrize("host", ["localhost", "LocalHost:8080", "127.0.0.1:1", "[::1]", "[::1]:8080"])
def test_names_of_this_machine_are_answered(host: str) -> None:
    sent: Any = Sent(host=host)
    asyncio.run(Access().check_host(sent))


@pytest.mark.parametrize("host", ["", "a.example", "localhost.a.example:80", "127.0.0.1.a.example", "[::2]:80", "::1"])
def test_names_of_other_sites_are_refused_without_keys(host: str) -> None:
    sent: Any = Sent(host=host)
    with pytest.raises(Problem, match="start it with --api-key-file") as refused:
        asyncio.run(Access().check_host(sent))
    assert refused.value.status == 403
    asyncio.run(Access(["sk-a"]).check_host(sent))


def test_a_key_has_a_number() -> None:
    access = Access(["sk-a", "sk-b"])
    assert [access.check_key({"authorization": f"Bearer {key}"}) for key in ("sk-a", "sk-b")] == [0, 1]
    assert Access().check_key({}) == 0
    with pytest.raises(Problem, match="wants an API key") as refused:
        access.check_key({})
    assert refused.value.headers == {"WWW-Authenticate": "Bearer"}


def test_keys_are_the_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(" sk-a b \r\n\n\tsk-c")
    assert read_keys(file) == ["sk-a b", "sk-c"]
    file.write_bytes(b"\xef\xbb\xbfsk-a\n # of Alice\n")
    assert read_keys(file) == ["sk-a"]
    for content, reason in (
        (b"", "has no key: write one a line"),
        (b" \n#", "has no key"),
        (b"\xff", "it is not text"),
        (b"sk-a\nschl\xc3\xbcssel", "line 2 of the file of API keys .*: use letters, digits and signs of ASCII"),
        (b"sk\x00a", "line 1 of the file of API keys"),
    ):
        file.write_bytes(content)
        with pytest.raises(OptionError, match=reason):
            read_keys(file)
    with pytest.raises(OptionError, match="is a directory"):
        read_keys(tmp_path)


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_bodies_of_another_type_are_refused(kind: str) -> None:
    sent: Any = Sent(**{"content-type": kind})
    with pytest.raises(Problem, match="add -H 'Content-Type: application/json'") as refused:
        asyncio.run(Access().read_body(sent))
    assert refused.value.status == 415
    sent = Sent(**{"content-type": "Application/JSON; charset=utf-8", "content-encoding": "Identity"})
    assert asyncio.run(Access().read_body(sent)) == b"{}"


def test_packed_bodies_are_refused() -> None:
    sent: Any = Sent(**{"content-type": "application/json", "content-encoding": "gzip"})
    with pytest.raises(Problem, match="the body is packed with 'gzip': send it as it is") as refused:
        asyncio.run(Access().read_body(sent))
    assert refused.value.status == 415
