"""`weightd cert`: makes the certificates that clients on other machines need, signed by an authority of one's own.

The folder holds the authority (ca.crt, ca.key), which is made at the first use, and a pair NAME.crt, NAME.key for each
host and client. Later calls add pairs. Keys are readable by their owner only. Nothing is overwritten.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flashclient.standard_streams import say
from weightd.errors import CertificateError, UsageError
from weightd.flags import FlagParser

AUTHORITY = "ca"
AUTHORITY_DAYS = 3650
DAYS_DEFAULT = 825  # the longest that browsers and Apple's libraries accept
CLOCKS_DIFFER = timedelta(hours=1)  # a certificate is valid on a machine whose clock is late
NAME = re.compile(r"[A-Za-z0-9_*][A-Za-z0-9_.:*-]{0,62}")


@dataclass(frozen=True)
class _Signer:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def main(arguments: Sequence[str]) -> int:
    """Makes what the flags ask for, and says how to use it. Raises UsageError, CertificateError, OSError."""
    options = _parser().parse_args(list(arguments))
    if not options.host and not options.client:
        raise UsageError("nothing to make: give --host NAME for the daemon's machine, --client NAME for a client")
    if not 0 < options.days <= AUTHORITY_DAYS:
        raise UsageError(f"--days {options.days} must be from 1 to {AUTHORITY_DAYS}")
    for name in (*options.host, *options.client):
        if not NAME.fullmatch(name) or name == AUTHORITY:
            raise UsageError(f"{name!r} cannot be the name of a certificate: use letters, digits, dots and dashes")
    _make(options.out, options.host, options.client, options.days)
    return 0


def _parser() -> FlagParser:
    parser = FlagParser(prog="weightd cert", allow_abbrev=False, description="Makes TLS certificates.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of the certificates")
    host = (
        "name or address that clients connect to; may be repeated: one certificate, called as the first, has them all"
    )
    parser.add_argument("--host", action="append", default=[], metavar="NAME", help=host)
    client = "a client, as in --allow MODEL=tls:NAME; may be repeated: each gets a certificate"
    parser.add_argument("--client", action="append", default=[], metavar="NAME", help=client)
    parser.add_argument("--days", type=int, default=DAYS_DEFAULT, help="that they are valid (default: 825)")
    return parser


def _make(folder: Path, hosts: Sequence[str], clients: Sequence[str], days: int) -> None:
    made = [*hosts[:1], *clients]
    if len(set(made)) < len(made):
        raise UsageError("a name is given twice: each certificate needs its own")
    taken = next((path for name in made for path in _files(folder, name) if path.exists()), None)
    if taken is not None:  # before anything is written
        raise CertificateError(f"{taken} is there already: remove it to make a new one")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    signer = _authority(folder)
    if hosts:
        _sign(folder, hosts[0], signer, hosts, ExtendedKeyUsageOID.SERVER_AUTH, days)
    for name in clients:
        _sign(folder, name, signer, [name], ExtendedKeyUsageOID.CLIENT_AUTH, days)
    authority, authority_key = _files(folder, AUTHORITY)
    if hosts:
        certificate, key = _files(folder, hosts[0])
        say(f"the daemon: weightd --listen 0.0.0.0:7411 --tls-cert {certificate} --tls-key {key}")
        say(f"  and, so that only clients with a certificate get in: --tls-client-ca {authority}")
        say(f"its clients: flashclient ... --address dns:///{hosts[0]}:7411 --tls-ca {authority}")
    for name in clients:
        certificate, key = _files(folder, name)
        say(f"client {name} adds: --tls-cert {certificate} --tls-key {key}")
    say(f"keep {authority_key} secret: who has it can make certificates that the daemon trusts")


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    """The files of a certificate and of its key."""
    stem = name.replace("*", "_").replace(":", "_")
    return folder / f"{stem}.crt", folder / f"{stem}.key"


def _authority(folder: Path) -> _Signer:
    """The authority of the folder, made if there is none."""
    certificate, key = _files(folder, AUTHORITY)
    if certificate.exists() or key.exists():
        return _read_authority(certificate, key)
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "weightd's authority")])
    usage = x509.KeyUsage(False, False, False, False, False, key_cert_sign=True, crl_sign=True, encipher_only=False,
                          decipher_only=False)  # fmt: skip
    builder = _builder(name, name, private.public_key(), AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage, critical=True)
    signed = builder.sign(private, hashes.SHA256())
    _write(certificate, key, signed, private)
    return _Signer(signed, private)


def _read_authority(certificate: Path, key: Path) -> _Signer:
    try:
        signed = x509.load_pem_x509_certificate(certificate.read_bytes())
        private = load_pem_private_key(key.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise CertificateError(f"{certificate} and {key} are no authority: {error}; use another --out") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey) or signed.public_key() != private.public_key():
        raise CertificateError(f"{key} is not the key of {certificate}: use another --out")
    return _Signer(signed, private)


def _sign(
    folder: Path, name: str, signer: _Signer, names: Sequence[str], use: x509.ObjectIdentifier, days: int
) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    public, issuer = private.public_key(), signer.certificate.subject
    builder = _builder(subject, issuer, public, days)
    for extension in (
        x509.SubjectAlternativeName([_general_name(one) for one in names]),
        x509.ExtendedKeyUsage([use]),
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()),
    ):
        builder = builder.add_extension(extension, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    _write(*_files(folder, name), builder.sign(signer.key, hashes.SHA256()), private)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(certificate: Path, key: Path, signed: x509.Certificate, private: ec.EllipticCurvePrivateKey) -> None:
    """Both files, the key first; neither is overwritten."""
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for path, content, mode in ((key, pem, 0o600), (certificate, signed.public_bytes(Encoding.PEM), 0o644)):
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
