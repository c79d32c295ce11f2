"""The address of a weightd: its grammar, the sockets that belong to it, and where clients look for one.

    unix:/path, unix:///path, /path     a Unix socket
    host:port, dns:///host:port         TCP; also ipv4:host:port and ipv6:[host]:port

Daemon and client share this module, so it imports only the standard library. Each wraps AddressError in an error of its
own, which names its own flag.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SOCKET_FILE = "weightd.sock"
SYSTEM_SOCKET = Path("/run/weightd") / SOCKET_FILE  # of the system service
# Two more sockets lie beside the gRPC socket PATH: PATH.data and PATH.peer.
DATA_SUFFIX = ".data"
IDENTITY_SUFFIX = ".peer"
SOCKET_PATH_BYTES_MAX = 107 - max(len(DATA_SUFFIX), len(IDENTITY_SUFFIX))  # sockaddr_un has 108, one of them a zero
IDENTITY_METADATA_KEY = "weightd-identity-bin"  # carries what PATH.peer sent: see the head of weightd.proto
PORT_MAX = 65535

_HOST = re.compile(r"\[[0-9A-Fa-f:.%\w]+\]|[\w.-]+")  # an IPv6 address in brackets, an IPv4 address, or a name


class AddressError(ValueError):
    """Says what is wrong with an address and what to use instead. It does not repeat the address."""


@dataclass(frozen=True)
class Address:
    """A Unix socket, or a TCP host and port."""

    socket_path: Path | None = None
    host: str = ""  # of TCP; an IPv6 address in brackets
    port: int = 0

    @property
    def target(self) -> str:
        """The address in its shortest form."""
        return f"{self.host}:{self.port}" if self.socket_path is None else f"unix:{self.socket_path}"

    @property
    def local(self) -> bool:
        """Whether it can be reached only from this machine."""
        return self.socket_path is not None or is_loopback(self.host)


def parse(text: str) -> Address:
    """Raises AddressError for a text that no weightd can have as its address."""
    if text.startswith(("unix:", "/")):
        return Address(_parse_socket(text))
    host, _, port = text.removeprefix("dns:///").removeprefix("ipv4:").removeprefix("ipv6:").rpartition(":")
    if not _HOST.fullmatch(host) or not port.isdecimal() or not 1 <= int(port) <= PORT_MAX:
        raise AddressError(f"use unix:/path, or host:port with a port from 1 to {PORT_MAX}")
    return Address(host=host, port=int(port))


def _parse_socket(text: str) -> Path:
    path = Path(text.removeprefix("unix:").replace("///", "/", 1))
    if not path.is_absolute():
        raise AddressError(f"use an absolute path, like unix:{path.absolute()}")
    if reason := unfit_for_a_socket(path):
        raise AddressError(reason)
    return path


def unfit_for_a_socket(path: Path) -> str | None:
    """The reason why a weightd cannot listen at `path`, or None if it can."""
    encoded = os.fsencode(path)
    if len(encoded) > SOCKET_PATH_BYTES_MAX:
        return f"the path has {len(encoded)} bytes, a socket's at most {SOCKET_PATH_BYTES_MAX}: use a shorter one"
    if b"," in encoded:
        return "the path has a comma, which separates addresses in gRPC: use a path without one"
    if b"\0" in encoded or not _is_utf8(encoded):
        return "the path is not valid UTF-8, the encoding in which weightd sends it to clients: use another path"
    return None


def _is_utf8(encoded: bytes) -> bool:
    try:
        encoded.decode()
    except UnicodeDecodeError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether connections to `host` stay on this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def user_socket(user_id: int, environment: Mapping[str, str]) -> Path:
    """The socket of a weightd that this user starts without --listen."""
    own_folder = f"weightd-{user_id}"
    runtime = environment.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) if runtime else Path(tempfile.gettempdir()) / own_folder
    path = folder / SOCKET_FILE
    if unfit_for_a_socket(path):  # TMPDIR or XDG_RUNTIME_DIR is too long
        path = Path("/tmp") / own_folder / SOCKET_FILE
    return path
