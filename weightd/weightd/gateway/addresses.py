"""Where the daemon listens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightd.errors import UsageError
from weightd_proto.addresses import SYSTEM_SOCKET, Address, AddressError, parse, user_socket


@dataclass(frozen=True)
class ListenAddress(Address):
    """Where gRPC listens."""

    default: bool = False  # no --listen was given: the daemon makes the socket's folder


@dataclass(frozen=True)
class MetricsAddress:
    """Where Prometheus reads the metrics."""

    host: str  # a name or an address, without brackets
    port: int
    loopback: bool  # no other machine can reach it


def parse_listen(text: str, default: bool = False) -> ListenAddress:
    """`text` has the grammar of weightd_proto.addresses; anything else raises UsageError."""
    try:
        address = parse(text)
    except AddressError as error:
        raise UsageError(f"--listen {text!r}: {error}") from error
    return ListenAddress(address.socket_path, address.host, address.port, default)


def default_listen(user_id: int, environment: Mapping[str, str]) -> ListenAddress:
    """The socket of the system service for root, the user's own for others."""
    path = SYSTEM_SOCKET if user_id == 0 else user_socket(user_id, environment)
    return parse_listen(f"unix:{path}", default=True)
