"""The daemon's certificates for TCP: read and checked at the start, and again when a file has changed."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from weightd.errors import UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TlsFiles:
    """PEM files for TCP: the daemon's certificate and key, and optionally the CA that signs clients' certificates."""

    cert: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class Certificates:
    """The contents of TlsFiles, checked to fit together."""

    cert: bytes
    key: bytes
    client_ca: bytes | None
    expires: datetime


class TlsCredentials:
    """The credentials of every new connection.

    If changed files cannot be used, an error is logged and the old certificates stay in use.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Raises UsageError when the files cannot be used."""
        self._files = files
        self._seen = _versions(files)
        self._take(read_certificates(files))

    def context(self) -> ssl.SSLContext:
        """The TLS context of the next connection."""
        self._reread()
        return self._context

    def reload(self) -> None:
        """Reads changed files now, so that the log says at once what is wrong with them."""
        self._reread()

    def _reread(self) -> None:
        versions = _versions(self._files)
        if versions == self._seen:
            return
        self._seen = versions
        try:
            certificates = read_certificates(self._files)
            self._take(certificates)
        except UsageError as error:
            logger.error("%s; the certificate that was read before stays in use", error)
            return
        logger.info("%s was read again, valid until %s", self._files.cert, f"{certificates.expires:%Y-%m-%d}")

    def _take(self, certificates: Certificates) -> None:
        self._context = _context(self._files, certificates)
        _warn_of_expiry(self._files, certificates)


def read_certificates(files: TlsFiles) -> Certificates:
    """Reads and checks the files. Raises UsageError, which names the flag, the file and what is wrong."""
    cert = _read(files.cert, "--tls-cert")
    key = _read(files.key, "--tls-key")
    client_ca = None if files.client_ca is None else _read(files.client_ca, "--tls-client-ca")
    first = _parse(cert, files.cert, "--tls-cert")[0]
    if client_ca is not None and files.client_ca is not None:
        _parse(client_ca, files.client_ca, "--tls-client-ca")
    _require_fit(files, first, key)
    return Certificates(cert, key, client_ca, first.not_valid_after_utc)


def names_of(certificate: bytes) -> frozenset[str]:
    """Subject alternative names of a verified certificate in DER form, or its common names where it has none."""
    parsed = x509.load_der_x509_certificate(certificate)
    try:
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        common = parsed.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        return frozenset(str(name.value) for name in common)
    texts = (x509.DNSName, x509.UniformResourceIdentifier, x509.RFC822Name)
    found = [name for kind in texts for name in names.get_values_for_type(kind)]
    return frozenset([*found, *map(str, names.get_values_for_type(x509.IPAddress))])


def _context(files: TlsFiles, certificates: Certificates) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["h2"])
    try:
        with _files_of(certificates.cert, certificates.key) as (cert, key):
            context.load_cert_chain(cert, key)
        if certificates.client_ca is not None:
            context.load_verify_locations(cadata=certificates.client_ca.decode())
            context.verify_mode = ssl.CERT_REQUIRED
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(f"--tls-cert {files.cert}: it cannot be used: {error}") from error
    return context


@contextmanager
def _files_of(*contents: bytes) -> Iterator[list[str]]:
    """Paths of in-memory copies: ssl accepts only paths, and the original files may have changed since the check."""
    with ExitStack() as stack:
        paths = []
        for content in contents:
            file = stack.enter_context(os.fdopen(os.memfd_create("pem"), "wb"))
            file.write(content)
            file.flush()
            paths.append(f"/proc/self/fd/{file.fileno()}")
        yield paths


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
    """Facts about the files that differ after a file is written or replaced."""
    paths = (files.cert, files.key, *([files.client_ca] if files.client_ca else []))
    return [_version(path) for path in paths]


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
