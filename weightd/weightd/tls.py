"""Certificates for TCP: read and checked at start, and again when a file has changed."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from weightd.config import TlsFiles
from weightd.errors import UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Certificates:
    """The contents of TlsFiles, checked to fit together."""

    cert: bytes
    key: bytes
    client_ca: bytes | None
    expires: datetime


class TlsCredentials:
    """What gRPC asks at every new connection. Files that were changed to something wrong are told of and not taken."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises UsageError when the files cannot be used."""
        self._files = files
        self._lock = threading.Lock()  # guards what follows; gRPC asks in threads of its own
        self._seen = _versions(files)
        self._certificates = read_certificates(files)
        _warn_of_expiry(files, self._certificates)

    def for_port(self) -> grpc.ServerCredentials:
        """For one port: gRPC keeps for each what it was last told."""
        with self._lock:
            given = [self._certificates]

        def changed() -> grpc.ServerCertificateConfiguration | None:
            with self._lock:
                self._reread()
                if given[0] is self._certificates:
                    return None
                given[0] = self._certificates
                return _configuration(given[0])

        return grpc.dynamic_ssl_server_credentials(
            _configuration(given[0]),
            changed,  # type: ignore[arg-type]  # None means "as before", which the types lack
            require_client_authentication=self._files.client_ca is not None,
        )

    def reload(self) -> None:
        """Looks at the files now, so that the log says at once what is wrong with them."""
        with self._lock:
            self._reread()

    def _reread(self) -> None:
        versions = _versions(self._files)
        if versions == self._seen:
            return
        self._seen = versions
        try:
            self._certificates = read_certificates(self._files)
        except UsageError as error:
            logger.error("%s; the certificate that was read before stays in use", error)
            return
        logger.info("%s was read again, valid until %s", self._files.cert, f"{self._certificates.expires:%Y-%m-%d}")
        _warn_of_expiry(self._files, self._certificates)


def read_certificates(files: TlsFiles) -> Certificates:
    """Reads and checks them; UsageError names the flag, the file and what is wrong."""
    cert = _read(files.cert, "--tls-cert")
    key = _read(files.key, "--tls-key")
    client_ca = None if files.client_ca is None else _read(files.client_ca, "--tls-client-ca")
    first = _parse(cert, files.cert, "--tls-cert")[0]
    if client_ca is not None and files.client_ca is not None:
        _parse(client_ca, files.client_ca, "--tls-client-ca")
    _require_fit(files, first, key)
    return Certificates(cert, key, client_ca, first.not_valid_after_utc)


def _configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    pair = (certificates.key, certificates.cert)
    return grpc.ssl_server_certificate_configuration([pair], certificates.client_ca)


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{flag} {path}: {(error.strerror or str(error)).lower()}") from error


def _parse(content: bytes, path: Path, flag: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise UsageError(f"{flag} {path}: no certificate in PEM form in it") from error


def _require_fit(files: TlsFiles, cert: x509.Certificate, key: bytes) -> None:
    try:
        private = load_pem_private_key(key, None)
    except TypeError as error:
        raise UsageError(f"--tls-key {files.key}: it has a password; give a key without one") from error
    except ValueError as error:
        raise UsageError(f"--tls-key {files.key}: no private key in PEM form in it") from error
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*form) != cert.public_key().public_bytes(*form):
        raise UsageError(f"--tls-key {files.key}: it is not the key of --tls-cert {files.cert}")


def _warn_of_expiry(files: TlsFiles, certificates: Certificates) -> None:
    if certificates.expires < datetime.now(UTC):
        logger.warning("--tls-cert %s expired on %s: clients refuse it", files.cert, f"{certificates.expires:%Y-%m-%d}")


def _versions(files: TlsFiles) -> list[tuple[int, int, int] | None]:
    """What changes when a file is written or replaced."""
    paths = (files.cert, files.key, *([files.client_ca] if files.client_ca else []))
    return [_version(path) for path in paths]


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
