"""Who may ask, and how much one request may hold."""

from __future__ import annotations

import asyncio
import codecs
import hmac
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastapi import Request

from flashclient.errors import OptionError
from flashclient.server.problems import Problem

HOSTS = ("localhost", "127.0.0.1", "[::1]")
BODY_S = 60.0
BODY_BYTES_MAX = 8 << 20  # a prompt of a million tokens has about 4 MB


def read_keys(path: Path) -> list[str]:
    """The API keys of a file, one a line; lines that begin with # are none.

    Raises:
        OptionError: the file cannot be read, has no key, or one that no client can send.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()  # editors of Windows put a mark before the first key
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise OptionError(f"the file of API keys {path}: {reason.lower()}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise OptionError(f"the file of API keys {path} has no key: write one a line")
    for number, line in enumerate(lines, start=1):
        if line.strip() in keys and not (line.isascii() and line.strip().isprintable()):
            raise OptionError(f"line {number} of the file of API keys {path}: use letters, digits and signs of ASCII")
    return keys


class Access:
    """API keys, and the bound of bodies.

    Args:
        keys: that may ask; none means that every user of this machine may.
    """

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._keys = [key.encode() for key in keys]

    async def check_host(self, request: Request) -> None:
        """Raises Problem where there are no keys, and a browser has come by the name of another site.

        The name may be a page's own, which its owner has pointed to this machine: the page could read what we answer.
        """
        host = request.headers.get("host", HOSTS[0])
        if not self._keys and re.sub(r":\d*$", "", host).lower() not in HOSTS:
            known = "this server has no API keys, so it answers at localhost, 127.0.0.1 and [::1] only"
            raise Problem(403, f"{known}, not at {host!r}: use one of these, or start it with --api-key-file")

    def check_key(self, headers: Mapping[str, str]) -> int:
        """The number of the request's key. Raises Problem unless it has one, as `Authorization: Bearer KEY`."""
        if not self._keys:
            return 0
        scheme, _, given = headers.get("authorization", "").partition(" ")
        found = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]  # all, in constant time
        if scheme.lower() != "bearer" or not any(found):
            text = "this server wants an API key: send it as `Authorization: Bearer KEY`"
            raise Problem(401, text if not given else "the API key is wrong", code="invalid_api_key")
        return found.index(True)

    async def read_body(self, request: Request) -> bytes:
        """The body. Raises Problem for one that is too large, without reading the rest of it, or too slow.

        Pages of other sites cannot send the type that is wanted: their browser asks first whether they may.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            text = f"the body's type is {kind or 'missing'}, not application/json"
            raise Problem(415, f"{text}: with curl, add -H 'Content-Type: application/json'")
        coding = request.headers.get("content-encoding", "identity").lower()
        if coding != "identity":
            raise Problem(415, f"the body is packed with {coding!r}: send it as it is, without Content-Encoding")
        declared = request.headers.get("content-length", "")
        if not declared.isdecimal() or (len(declared) < 20 and int(declared) <= BODY_BYTES_MAX):
            try:
                async with asyncio.timeout(BODY_S):
                    return await _read(request)
            except TimeoutError:
                raise Problem(408, f"the body has not come within {BODY_S:g} s: send it faster") from None
        raise _too_large()


async def _read(request: Request) -> bytes:
    held = bytearray()
    async for piece in request.stream():
        held += piece
        if len(held) > BODY_BYTES_MAX:
            raise _too_large()
    return bytes(held).removeprefix(codecs.BOM_UTF8)  # which editors of Windows put before a text


def _too_large() -> Problem:
    return Problem(413, f"the body is larger than {BODY_BYTES_MAX >> 20} MiB: shorten the prompt")
