"""Arguments that several commands take, and kinds of values."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flashclient.errors import OptionError
from weightd_proto.modes import KV_DTYPES, KV_PLAIN


def positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number of at least 1")
    return value


def not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number of at least 0")
    return int(text)


UNITS_BYTES = {"": 1, "b": 1} | {f"{letter}ib": 1 << 10 * (at + 1) for at, letter in enumerate("kmgt")}
UNITS_BYTES |= {f"{letter}b": 1000 ** (at + 1) for at, letter in enumerate("kmgt")}


def size(text: str) -> int:
    """Bytes, such as 8GiB, 300 MB or 0."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].lower() not in UNITS_BYTES:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 8GiB, 512MiB or 0")
    return int(float(found[1]) * UNITS_BYTES[found[2].lower()])


def utf8(text: str) -> str:
    """The UTF-8 that the command line holds, whatever the locale is."""
    try:
        return os.fsencode(text).decode()
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 ({error.reason} at byte {error.start})") from error


def share(text: str) -> float:
    """A share such as 2% or 0.02."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a share such as 2% or 0.02") from None


def ranks(text: str) -> tuple[int, ...]:
    return tuple(positive(one) for one in text.split(","))


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], purpose: str, several: bool = False
) -> Any:
    """A subcommand with the arguments that all of them take.

    Args:
        several: whether it takes several models, as `models`.
    """
    command = commands.add_parser(name, help=purpose)
    command.set_defaults(run=run)
    command.add_argument(
        "models" if several else "model",
        nargs="+" if several else None,
        metavar="model",
        help="name in the store; with --store also the path of a checkpoint, or a model of the hub",
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument(
        "--address",
        help="address of a weightd: unix:/path, or host:port with TLS (default: your own weightd, else the system's)",
    )
    where.add_argument("--store", metavar="DIR", help="attach to the weightd of this store, or start a private one")
    command.add_argument("--dram", metavar="SIZE", help="memory cap of a private weightd, such as 6.5GiB or 50%%")
    add_tls_flags(command)
    command.add_argument(
        "--transport", choices=("auto", "shm", "grpc"), default="auto", help="shm needs a weightd on this machine"
    )
    command.add_argument("--timeout-s", type=float, default=30.0, help="how long to wait for a weightd")
    command.add_argument("--json", action="store_true", help="print one JSON object instead")
    return command


def add_mode_flag(command: Any) -> None:
    """--mode."""
    command.add_argument(
        "--mode", default="auto", help="auto (default: as calibration decided), exact, predict or threshold"
    )


def add_kv_dtype_flag(command: Any) -> None:
    """--kv-dtype."""
    command.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        default=KV_PLAIN,
        help="of keys and values: plain (default: the model's dtype), or int8, which halves their memory at a small "
        "loss (client/README.md)",
    )


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Raises OptionError for bytes that are not UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise OptionError(f"{what} is not UTF-8 ({error.reason} at byte {error.start})") from error


def add_tls_flags(parser: Any) -> None:
    """--tls-ca, --tls-cert and --tls-key: the files of TlsOptions."""
    parser.add_argument("--tls-ca", metavar="FILE", help="certificate that signed the daemon's; turns TLS on")
    parser.add_argument("--tls-cert", metavar="FILE", help="certificate of this client, for a daemon that asks for one")
    parser.add_argument("--tls-key", metavar="FILE", help="private key of --tls-cert")
