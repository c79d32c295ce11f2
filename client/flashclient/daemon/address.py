"""Where a weightd is, and what proves both ends to each other: checked before anything is sent."""

from __future__ import annotations

import ipaddress
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from flashclient.errors import OptionError

SYSTEM_ADDRESS = "unix:/run/weightd/weightd.sock"  # where the system service listens
WANTED = "use unix:/path, or host:port such as dns:///weights.example.org:7411"
# sockaddr_un holds 108 bytes with the final zero; weightd's other two sockets add five to the same path.
SOCKET_PATH_BYTES_MAX = 107 - len(".data")
_HOST = re.compile(r"\[[0-9A-Fa-f:.%\w]+\]|[\w.-]+")


@dataclass(frozen=True)
class Address:
    """A weightd's, as people write it."""

    target: str  # unix:/path, or [dns:///]host:port
    socket_path: Path | None  # of a Unix socket
    loopback: bool  # a port of this machine, which no other can listen to

    @property
    def channel_target(self) -> str:
        """As gRPC reads it: a URI, in which `#`, `?`, `%` and what is not ASCII would mean something else."""
        return self.target if self.socket_path is None else f"unix:{quote(os.fsencode(self.socket_path))}"

    @property
    def beyond_proxies(self) -> bool:
        """Whether no proxy of http_proxy and its like can reach it. Others go through theirs, as gRPC does."""
        return self.socket_path is not None or self.loopback


@dataclass(frozen=True)
class TlsOptions:
    """PEM files of the client: who signs the daemon's certificate; and one's own, where the daemon asks for it."""

    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Raises OptionError for an incomplete set."""
        if (self.cert is None) != (self.key is None):
            raise OptionError("tls_cert= and tls_key= belong together: pass both, or leave both out")
        if self.cert is not None and self.ca is None:
            raise OptionError("tls_cert= needs tls_ca= too: the file with whom the daemon's certificate is signed by")

    @property
    def given(self) -> bool:
        return self.ca is not None

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Contents of ca, cert and key. Raises OptionError, naming the option and the file."""
        return _read("tls_ca", self.ca), _read("tls_cert", self.cert), _read("tls_key", self.key)


NO_TLS = TlsOptions()


def parse_address(text: str, tls: TlsOptions = NO_TLS) -> Address:
    """`unix:/path`, `/path`, `host:port` or `dns:///host:port`.

    Raises OptionError for anything else, and where TLS is needed or of no use.
    """
    if text.startswith(("unix:", "/")):
        return _parse_socket(text, tls)
    host, _, port = text.removeprefix("dns:///").removeprefix("ipv4:").removeprefix("ipv6:").rpartition(":")
    if not _HOST.fullmatch(host) or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise OptionError(f"address='{text}' is no address of a weightd: {WANTED}")
    loopback = _is_loopback(host)
    if not loopback and not tls.given:
        raise OptionError(
            f"address='{text}' is on another machine, and weights travel only with TLS: pass tls_ca=, the file with "
            "the certificate that signed the daemon's"
        )
    return Address(text, None, loopback)


def _parse_socket(text: str, tls: TlsOptions) -> Address:
    path = Path(text.removeprefix("unix:").replace("///", "/", 1))
    if not path.is_absolute():
        raise OptionError(f"address='{text}' must have an absolute path, like unix:{path.absolute()}")
    if tls.given:
        raise OptionError(f"tls_ca= is for TCP: leave it out for address='{text}'")
    if not fits_socket(path):
        raise OptionError(
            f"address='{text}' is no path of a socket: that has at most {SOCKET_PATH_BYTES_MAX} bytes, and no comma, "
            "which parts addresses for gRPC"
        )
    return Address(f"unix:{path}", path, False)


def fits_socket(path: Path) -> bool:
    """Whether a weightd can listen at `path`."""
    encoded = os.fsencode(path)
    return len(encoded) <= SOCKET_PATH_BYTES_MAX and b"," not in encoded and b"\0" not in encoded


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _read(option: str, path: str | os.PathLike[str] | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise OptionError(f"{option}='{os.fspath(path)}': {(error.strerror or str(error)).lower()}") from error
    if b"-----BEGIN " not in content:
        raise OptionError(f"{option}='{os.fspath(path)}' is not a file in PEM form")
    return content


def default_address(user_id: int, environment: Mapping[str, str]) -> str:
    """Of the weightd that this user has started without --listen, or else of the system's service."""
    runtime = environment.get("XDG_RUNTIME_DIR")
    own_folder = f"weightd-{user_id}"
    folder = Path(runtime) if runtime else Path(tempfile.gettempdir()) / own_folder
    own = folder / "weightd.sock"
    if not fits_socket(own):  # weightd's own rule (its config.py)
        own = Path("/tmp") / own_folder / "weightd.sock"
    try:
        listens = own.stat().st_uid == user_id  # another's in a folder that all can write to is not asked
    except OSError:
        listens = False
    return f"unix:{own}" if listens else SYSTEM_ADDRESS
