"""The grammar of addresses, and that daemon and client agree about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashclient.daemon.address import TlsOptions, parse_address
from flashclient.errors import OptionError
from weightd.errors import UsageError
from weightd.gateway.addresses import parse_listen
from weightd_proto.addresses import SOCKET_PATH_BYTES_MAX, Address, AddressError, parse


@pytest.mark.parametrize(
    ("text", "target", "local"),
    [
        ("unix:/run/w.sock", "unix:/run/w.sock", True),
        ("unix:///run/w.sock", "unix:/run/w.sock", True),
        ("/run/w.sock", "unix:/run/w.sock", True),
        ("localhost:7070", "localhost:7070", True),
        ("dns:///localhost:7070", "localhost:7070", True),
        ("127.0.0.2:7070", "127.0.0.2:7070", True),
        ("ipv4:127.0.0.2:7070", "127.0.0.2:7070", True),
        ("ipv6:[::1]:7070", "[::1]:7070", True),
        ("[::]:7070", "[::]:7070", False),
        ("0.0.0.0:65535", "0.0.0.0:65535", False),
        ("example.org:7070", "example.org:7070", False),
    ],
)
def test_both_sides_read_an_address_alike(text: str, target: str, local: bool) -> None:
    address = parse(text)
    assert (address.target, address.local) == (target, local)
    assert parse(target) == address
    assert parse_listen(text).target == target
    assert parse_address(text, TlsOptions() if local else TlsOptions("ca.pem")) == address


def test_an_address_is_a_path_or_a_host_and_port() -> None:
    assert parse("/run/w.sock") == Address(Path("/run/w.sock"))
    assert parse("[::1]:7070") == Address(None, "[::1]", 7070)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("localhost", "use unix:/path, or host:port"),
        (":7070", "use unix:/path, or host:port"),
        ("::1:7070", "use unix:/path, or host:port"),
        ("localhost:0", "a port from 1 to 65535"),
        ("localhost:65536", "a port from 1 to 65535"),
        ("localhost:http", "a port from 1 to 65535"),
        ("a b:7070", "use unix:/path, or host:port"),
        ("http://localhost:7070", "use unix:/path, or host:port"),
        ("vsock:1:2", "use unix:/path, or host:port"),
        ("unix:a", "use an absolute path, like unix:/"),
        ("unix:/tmp/a,b", "use a path without one"),
        ("unix:/tmp/a\0b", "use another path"),
        ("unix:/tmp/\udcff", "use another path"),
        ("unix:/" + "x" * SOCKET_PATH_BYTES_MAX, "use a shorter one"),
    ],
)
def test_both_sides_refuse_with_the_same_remedy(text: str, remedy: str) -> None:
    with pytest.raises(AddressError, match=remedy):
        parse(text)
    with pytest.raises(UsageError, match=f"(?s)--listen .*{remedy}"):
        parse_listen(text)
    with pytest.raises(OptionError, match=f"(?s)address=.*{remedy}"):
        parse_address(text)


def test_a_socket_path_leaves_room_for_the_data_socket() -> None:
    longest = "unix:/" + "x" * (SOCKET_PATH_BYTES_MAX - 1)
    assert parse(longest).target == longest
    assert len("/" + "x" * (SOCKET_PATH_BYTES_MAX - 1) + ".data") == 107
