"""Where the daemon listens: addresses as people write them, checked."""

from __future__ import annotations

import ipaddress
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightd.errors import UsageError

# sockaddr_un holds 108 bytes with the final zero; the data and the identity socket add these to the same path.
DATA_SUFFIX = ".data"
IDENTITY_SUFFIX = ".peer"
SOCKET_PATH_BYTES_MAX = 107 - max(len(DATA_SUFFIX), len(IDENTITY_SUFFIX))
SYSTEM_SOCKET = Path("/run/weightd/weightd.sock")


@dataclass(frozen=True)
class ListenAddress:
    """Where gRPC listens: a Unix socket's path, or a host and port."""

    target: str  # as people write it: unix:/path or host:port
    socket_path: Path | None  # of a Unix socket
    default: bool = False  # not asked for by name: its directory is made
    loopback: bool = True  # no other machine can reach it


@dataclass(frozen=True)
class MetricsAddress:
    """Where Prometheus reads the metrics."""

    host: str  # a name or an address, without brackets
    port: int
    loopback: bool  # no other machine can reach it


def parse_listen(text: str, default: bool = False) -> ListenAddress:
    """`unix:/path`, `/path` or `host:port`; anything else raises UsageError."""
    if text.startswith(("unix:", "/")):
        return _parse_socket(text, default)
    host, separator, port = text.removeprefix("dns:///").removeprefix("ipv4:").removeprefix("ipv6:").rpartition(":")
    if not separator or not _is_host(host) or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise UsageError(f"--listen {text!r}: want unix:/path, or host:port with a port from 1 to 65535")
    return ListenAddress(f"{host}:{port}", None, loopback=is_loopback(host))


def default_listen(user_id: int, environment: Mapping[str, str]) -> ListenAddress:
    """The system service's socket for root, one in the user's runtime directory for others."""
    if user_id == 0:
        path = SYSTEM_SOCKET
    elif runtime := environment.get("XDG_RUNTIME_DIR"):
        path = Path(runtime) / "weightd.sock"
    else:
        path = Path(tempfile.gettempdir()) / f"weightd-{user_id}" / "weightd.sock"
    if unfit_for_a_socket(path):  # a long TMPDIR; clients look at the same place
        path = Path("/tmp") / f"weightd-{user_id}" / "weightd.sock"
    return parse_listen(f"unix:{path}", default=True)


def _parse_socket(text: str, default: bool) -> ListenAddress:
    path = Path(text.removeprefix("unix:").replace("///", "/", 1))
    if not path.is_absolute():
        raise UsageError(f"--listen {text!r}: want an absolute path, like unix:{path.absolute()}")
    if reason := unfit_for_a_socket(path):
        raise UsageError(f"--listen {text!r}: {reason}")
    return ListenAddress(f"unix:{path}", path, default)


def unfit_for_a_socket(path: Path) -> str | None:
    """Why clients could not find a socket there."""
    encoded = os.fsencode(path)
    if len(encoded) > SOCKET_PATH_BYTES_MAX:
        return f"the path has {len(encoded)} bytes, a socket's at most {SOCKET_PATH_BYTES_MAX}; use a shorter one"
    if b"," in encoded:
        return "the path has a comma, which parts addresses for gRPC; use another"
    if b"\0" in encoded or not _is_utf8(encoded):
        return "the path is not valid UTF-8, in which clients are told of it; use another"
    return None


def _is_utf8(encoded: bytes) -> bool:
    try:
        encoded.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_host(host: str) -> bool:
    """A name, an IPv4 address, or an IPv6 address in brackets."""
    return bool(host) and "/" not in host and (":" not in host or (host.startswith("[") and host.endswith("]")))


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
