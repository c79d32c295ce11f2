"""Where a weightd is, and the TLS files for it: checked before anything is sent."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flashclient.errors import OptionError
from weightd_proto.addresses import SYSTEM_SOCKET, Address, AddressError, parse, user_socket


@dataclass(frozen=True)
class TlsOptions:
    """PEM files of the client.

    Attributes:
        ca: the certificate that signed the daemon's.
        cert, key: the client's own certificate and key, for a daemon that asks for one.
    """

    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Raises OptionError for an incomplete set."""
        if (self.cert is None) != (self.key is None):
            raise OptionError("tls_cert= and tls_key= belong together: pass both, or leave both out")
        if self.cert is not None and self.ca is None:
            raise OptionError("tls_cert= needs tls_ca= too: the file with the certificate that signed the daemon's")

    @property
    def given(self) -> bool:
        return self.ca is not None

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Contents of ca, cert and key. Raises OptionError, which names the option and the file."""
        return _read("tls_ca", self.ca), _read("tls_cert", self.cert), _read("tls_key", self.key)


NO_TLS = TlsOptions()


def parse_address(text: str, tls: TlsOptions = NO_TLS) -> Address:
    """`text` has the grammar of weightd_proto.addresses.

    Raises OptionError for anything else, for an address beyond this machine without TLS, and for TLS on a Unix socket.
    """
    try:
        address = parse(text)
    except AddressError as error:
        raise OptionError(f"address='{text}' is not an address of a weightd: {error}") from error
    if address.socket_path is not None and tls.given:
        raise OptionError(f"tls_ca= is for TCP: leave it out for address='{text}'")
    if not address.local and not tls.given:
        raise OptionError(
            f"address='{text}' is on another machine, and weights travel only with TLS: pass tls_ca=, the file with "
            "the certificate that signed the daemon's"
        )
    return address


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
    """The address of the weightd that this user has started without --listen, or else of the system's service."""
    own = user_socket(user_id, environment)
    try:  # a folder that all can write to may hold another user's socket: the client does not trust it
        is_own = own.stat().st_uid == user_id
    except OSError:
        is_own = False
    return f"unix:{own if is_own else SYSTEM_SOCKET}"
