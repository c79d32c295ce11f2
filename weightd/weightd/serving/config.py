"""The daemon's configuration: one frozen record, built once from flags and an optional TOML file.

A key of the file is a flag without its leading dashes, as in `io-engine = "threads"`. `listen` is a list. Flags
override the file. Unknown flags and keys are refused, and the error names the nearest known one.
"""

from __future__ import annotations

import argparse
import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightd.errors import UsageError
from weightd.flags import FlagParser
from weightd.gateway.access import Rules, parse_rules
from weightd.gateway.addresses import (
    ListenAddress,
    MetricsAddress,
    default_listen,
    parse_listen,
)
from weightd.gateway.tls import TlsFiles
from weightd.machine.budget import DRAM_FLOOR
from weightd.sizes import NOTHING_GIVEN, Amount, parse_size
from weightd_proto.addresses import is_loopback
from weightd_proto.dram import DRAM_BYTES_MIN

IO_ENGINES = ("auto", "io_uring", "threads")
IO_THREADS_DEFAULT = 32  # the paper's number of reading threads
IO_THREADS_MAX = 256
IO_DEPTH_MAX = 4096
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
METRICS_HOST = "127.0.0.1"


@dataclass(frozen=True)
class ServiceManager:
    """What systemd passed on: the socket for sd_notify(3), and the watchdog's deadline."""

    notify_socket: str  # a path, or @ and an abstract name
    watchdog_s: float | None = None  # systemd kills the daemon after this time without a sign of life


@dataclass(frozen=True)
class ServeConfig:
    """The settings of `weightd --store DIR ...`."""

    store: Path
    listen: tuple[ListenAddress, ...]
    dram: Amount = NOTHING_GIVEN  # a percentage is of the tightest memory limit, not of what is free
    dram_floor: Amount = DRAM_FLOOR
    io_engine: str = "auto"
    io_threads: int = IO_THREADS_DEFAULT
    io_depth: int = 0  # 0: the engine's default
    allow_buffered: bool = False
    cold_start: bool = False
    owner_fd: int | None = None
    tls: TlsFiles | None = None
    allow: Rules = ()  # who may read which model
    allow_publish: Rules = ()  # who may publish calibrations of which model
    service_manager: ServiceManager | None = None
    metrics: MetricsAddress | None = None
    log_level: str = "info"
    log_format: str = "text"


def load_config(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> ServeConfig:
    """The configuration of `weightd <arguments>`; raises UsageError, naming the flag or key and its value."""
    parser = _parser()
    flags, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise UsageError(f"unknown flag {unknown[0]!r}{_nearest(unknown[0], _flag_names(parser))}")
    settings = _read_file(flags.config) if flags.config is not None else {}
    settings |= {name: value for name, value in vars(flags).items() if value is not None and name != "config"}
    return _build(settings, os.environ if environment is None else environment)


def _parser() -> FlagParser:
    parser = FlagParser(prog="weightd", allow_abbrev=False, description="Serve the models of a store from flash.")
    add = parser.add_argument
    add("--store", metavar="DIR", help="the store to serve")
    dram = "memory for weights, pool and tables: a size, or a percentage of the machine's memory or the cgroup's limit"
    add("--dram", metavar="SIZE|PCT%", help=f"{dram} (default: half of what is free)")
    floor = "memory pressure shrinks the pool no further than this: a size, or a percentage of --dram"
    add("--dram-floor", metavar="SIZE|PCT%", help=f"{floor} (default: {DRAM_FLOOR.percent:.0f}%%; 100%% ignores it)")
    add("--listen", metavar="ADDR", action="append", help="unix:/path or host:port; can be repeated")
    add("--io-engine", choices=IO_ENGINES, help="how to read the device (default: auto, the best that is allowed)")
    add("--io-threads", metavar="N", help=f"reading threads of --io-engine threads (default: {IO_THREADS_DEFAULT})")
    add("--io-depth", metavar="N", help="reads in flight of --io-engine io_uring")
    add("--tls-cert", metavar="FILE", help="PEM certificate (chain) for TCP; needed for clients on other machines")
    add("--tls-key", metavar="FILE", help="the certificate's private key, PEM without a password")
    add(
        "--tls-client-ca", metavar="FILE", help="require clients' certificates, signed by one of these CAs (mutual TLS)"
    )
    who = (
        "MODEL=WHO[,WHO]..., where WHO is user:NAME, group:NAME or tls:NAME, and MODEL * is all others; can be repeated"
    )
    add(
        "--allow",
        metavar="RULE",
        action="append",
        help=f"who may read a model (default: everybody who can connect): {who}",
    )
    add(
        "--allow-publish",
        metavar="RULE",
        action="append",
        help="who may publish a model's calibrations; the same form as --allow",
    )
    add(
        "--metrics",
        metavar="HOST:PORT",
        help=f"serve Prometheus metrics at this address (default host: {METRICS_HOST})",
    )
    add("--log-level", choices=LOG_LEVELS, help="least severe level that is logged (default: info)")
    add("--log-format", choices=LOG_FORMATS, help="text (default), or one JSON object per line")
    add("--config", metavar="FILE", help="a TOML file with these flags as keys")
    add(
        "--allow-buffered",
        action="store_true",
        default=None,
        help="use buffered I/O where the file system refuses O_DIRECT",
    )
    cold = "start with an empty pool and without hotness: do not save it, do not use it, and read nothing ahead"
    add("--cold-start", action="store_true", default=None, help=cold)
    add("--owner-fd", metavar="FD", help=argparse.SUPPRESS)
    return parser


def _flag_names(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings if name.startswith("--")]


def _nearest(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else f"; known: {', '.join(known)}"


def _read_file(name: str) -> dict[str, Any]:
    try:
        content = tomllib.loads(Path(name).read_text())
    except OSError as error:
        raise UsageError(f"--config {name}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"--config {name}: not TOML: {error}") from error
    known = [flag.removeprefix("--") for flag in _flag_names(_parser()) if flag not in ("--config", "--help")]
    for key in content:
        if key not in known:
            raise UsageError(f"--config {name}: unknown key {key!r}{_nearest(key, known)}")
    return {key.replace("-", "_"): value for key, value in content.items()}


def _build(settings: Mapping[str, Any], environment: Mapping[str, str]) -> ServeConfig:
    listen = _parse_listens(settings.get("listen"), environment)
    return ServeConfig(
        store=_parse_store(settings.get("store")),
        listen=listen,
        dram=parse_dram("--dram", settings.get("dram"), NOTHING_GIVEN),
        dram_floor=parse_dram("--dram-floor", settings.get("dram_floor"), DRAM_FLOOR),
        io_engine=_parse_engine(settings.get("io_engine", "auto")),
        io_threads=_parse_count(settings, "io_threads", 1, IO_THREADS_MAX) or IO_THREADS_DEFAULT,
        io_depth=_parse_count(settings, "io_depth", 1, IO_DEPTH_MAX) or 0,
        allow_buffered=_parse_switch(settings, "allow_buffered"),
        cold_start=_parse_switch(settings, "cold_start"),
        owner_fd=_parse_count(settings, "owner_fd", 0, 1 << 20),
        tls=_parse_tls(settings, listen),
        allow=_parse_rules(settings, "allow"),
        allow_publish=_parse_rules(settings, "allow_publish"),
        service_manager=_service_manager(environment),
        metrics=_parse_metrics(settings.get("metrics")),
        log_level=_parse_log_level(settings.get("log_level", "info")),
        log_format=_parse_log_format(settings.get("log_format", "text")),
    )


def _parse_store(value: object) -> Path:
    if not isinstance(value, str) or not value:
        raise UsageError("--store DIR is needed: the folder that `weightd import` made")
    return Path(value)


def parse_dram(flag: str, value: object, default: Amount) -> Amount:
    """The value of --dram or --dram-floor: `default` if it is None. Raises UsageError."""
    if value is None:
        return default
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise UsageError(f"{flag} {value!r}: want a size like 6.5GiB or a percentage like 50%")
    if not value.endswith("%"):
        try:
            size_bytes = parse_size(value)
        except UsageError as error:
            raise UsageError(f"{flag} is {error}") from error
        if size_bytes < DRAM_BYTES_MIN and value.strip().isdecimal() and flag == "--dram":
            meant = f"; did you mean {size_bytes}GiB or {size_bytes}%?" if 0 < size_bytes <= 100 else ", try 512MiB"
            raise UsageError(f"--dram {value} is {size_bytes} bytes, because it has no unit{meant}")
        return Amount(bytes=size_bytes)
    try:
        percent = float(value.removesuffix("%"))
    except ValueError:
        percent = 0.0
    if not 0 < percent <= 100:
        raise UsageError(f"{flag} {value!r}: want a percentage above 0% and up to 100%")
    return Amount(percent=percent)


def _parse_listens(value: object, environment: Mapping[str, str]) -> tuple[ListenAddress, ...]:
    if value is None:
        return (default_listen(os.geteuid(), environment),)
    texts = [text for text in value if isinstance(text, str)] if isinstance(value, list) else []
    if not texts or texts != value:
        raise UsageError(f"listen = {value!r}: want a list of addresses like ['unix:/run/weightd/weightd.sock']")
    return tuple(parse_listen(text) for text in texts)


def _parse_tls(settings: Mapping[str, Any], listen: Sequence[ListenAddress]) -> TlsFiles | None:
    cert, key, client_ca = (_parse_path(settings, name) for name in ("tls_cert", "tls_key", "tls_client_ca"))
    if cert is None or key is None:
        if cert or key or client_ca:
            raise UsageError("--tls-cert and --tls-key belong together, and --tls-client-ca needs both")
        for address in listen:
            if not address.local:
                raise UsageError(
                    f"--listen {address.target!r} is not a loopback address, and beyond this machine TLS is needed: "
                    "give --tls-cert FILE --tls-key FILE (and --tls-client-ca FILE to know who calls), or use localhost"
                )
        return None
    if all(address.socket_path is not None for address in listen):
        raise UsageError("--tls-cert is for TCP: give --listen host:port too, or leave the certificate out")
    return TlsFiles(cert, key, client_ca)


def _parse_path(settings: Mapping[str, Any], name: str) -> Path | None:
    value = settings.get(name)
    if value is not None and (not isinstance(value, str) or not value):
        raise UsageError(f"--{name.replace('_', '-')} {value!r}: want a file's name")
    return None if value is None else Path(value).absolute()


def _parse_rules(settings: Mapping[str, Any], name: str) -> Rules:
    value = settings.get(name, [])
    flag = name.replace("_", "-")
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UsageError(f"{flag} = {value!r}: want a list of rules like ['opt-1.3b=group:research,user:1000']")
    return parse_rules(value, f"--{flag}")


def _service_manager(environment: Mapping[str, str]) -> ServiceManager | None:
    """Of sd_notify(3) and sd_watchdog_enabled(3)."""
    notify_socket = environment.get("NOTIFY_SOCKET")
    if not notify_socket:
        return None
    microseconds = environment.get("WATCHDOG_USEC", "")
    ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    if not ours or not microseconds.isdecimal() or not int(microseconds):
        return ServiceManager(notify_socket)
    return ServiceManager(notify_socket, int(microseconds) / 1e6)


def _parse_engine(value: object) -> str:
    if not isinstance(value, str) or value not in IO_ENGINES:
        raise UsageError(f"--io-engine {value!r}: want one of {', '.join(IO_ENGINES)}")
    return value


def _parse_metrics(value: object) -> MetricsAddress | None:
    if value is None:
        return None
    host, _, port = str(value).rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or METRICS_HOST
    if isinstance(value, bool) or not port.isdecimal() or not 1 <= int(port) <= 65535 or "/" in host:
        raise UsageError(f"--metrics {value!r}: want host:port, like {METRICS_HOST}:9464, with a port from 1 to 65535")
    return MetricsAddress(host, int(port), is_loopback(host))


def _parse_log_level(value: object) -> str:
    if not isinstance(value, str) or value not in LOG_LEVELS:
        raise UsageError(f"--log-level {value!r}: want one of {', '.join(LOG_LEVELS)}")
    return value


def _parse_log_format(value: object) -> str:
    if not isinstance(value, str) or value not in LOG_FORMATS:
        raise UsageError(f"--log-format {value!r}: want one of {', '.join(LOG_FORMATS)}")
    return value


def _parse_count(settings: Mapping[str, Any], name: str, smallest: int, largest: int) -> int | None:
    value = settings.get(name)
    if value is None:
        return None
    flag = "--" + name.replace("_", "-")
    try:
        number = int(str(value))
    except ValueError:
        raise UsageError(f"{flag} {value!r}: want a whole number") from None
    if not smallest <= number <= largest:
        raise UsageError(f"{flag} {number}: want {smallest} to {largest}")
    return number


def _parse_switch(settings: Mapping[str, Any], name: str) -> bool:
    value = settings.get(name, False)
    if not isinstance(value, bool):
        raise UsageError(f"{name.replace('_', '-')} = {value!r}: want true or false")
    return value
