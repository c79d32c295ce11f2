"""`weightd top`: shows the statistics of a running daemon.

On a terminal it asks for Stats at every interval and shows what happened in between, on the terminal's alternate
screen, until q or Ctrl-C ends it. If standard output is not a terminal, it prints one table for one interval. --json
prints one object for one interval.

It connects as flashclient does, with the same addresses, TLS options and identity.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc

from flashclient.commands.arguments import add_tls_flags
from flashclient.commands.keywords import in_flags
from flashclient.daemon.address import TlsOptions, default_address, parse_address
from flashclient.daemon.channel import open_channel, stub_of
from flashclient.errors import OptionError
from flashclient.standard_streams import say
from weightd.errors import DaemonError, UsageError
from weightd.flags import FlagParser
from weightd.log import one_line
from weightd.watching.terminal import Event, drawing
from weightd.watching.top_table import CLIENT_COLUMNS, MODEL_COLUMNS, View, lines_of, view_of
from weightd_proto import weightd_pb2

INTERVAL_S = 1.0
INTERVAL_S_RANGE = (0.1, 3600.0)
ANSWER_WITHIN_S = 5.0  # a daemon on a busy machine answers in milliseconds; a frozen one never does
PLAIN_REASONS = {  # for texts of gRPC's core
    "No such file or directory": "nothing listens there",
    "Connection refused": "nothing listens there",
    "Permission denied": "permission denied, as the socket is for its user and group (`ls -ld` shows them)",
    "Hostname Verification Check failed": "its certificate is for another name",
}


@dataclass(frozen=True)
class Daemon:
    """The weightd whose statistics are shown."""

    address: str
    tls: bool
    stub: Any  # of weightd.v1.Weightd

    def ask(self) -> weightd_pb2.StatsResponse:
        """The daemon's statistics. Raises DaemonError if it does not answer."""
        try:
            answer: weightd_pb2.StatsResponse = self.stub.Stats(weightd_pb2.StatsRequest(), timeout=ANSWER_WITHIN_S)
        except grpc.RpcError as error:
            reason = one_line(error.details() or error.code().name.lower())
            reason = next((plain for said, plain in PLAIN_REASONS.items() if said in reason), reason)
            what_to_try = "check the certificates" if self.tls else "give --address, and --tls-ca if it wants TLS"
            raise DaemonError(f"no weightd answers at {self.address}: {reason}; start it, or {what_to_try}") from error
        return answer


def main(arguments: Sequence[str]) -> int:
    """Runs until q, Ctrl-C or SIGTERM. Raises WeightdError if the input is wrong or the daemon does not answer."""
    flags = _parser().parse_args(list(arguments))
    interval_s = _interval(flags.interval)
    tls = (flags.tls_ca, flags.tls_cert, flags.tls_key)
    with suppress(KeyboardInterrupt), _connected(flags.address, *tls) as daemon:
        if flags.json:
            say(json.dumps(_one_view(daemon, interval_s).as_json()))
        elif not sys.stdout.isatty():
            say("\n".join(lines_of(_one_view(daemon, interval_s))))
        else:
            _show(daemon, interval_s)
    return 0


def _parser() -> FlagParser:
    parser = FlagParser(prog="weightd top", allow_abbrev=False, description="Watches a running weightd.")
    parser.add_argument("--address", metavar="ADDR", help="unix:/path or host:port (default: weightd's default socket)")
    add_tls_flags(parser)
    parser.add_argument(
        "--interval", metavar="S", default=str(INTERVAL_S), help=f"seconds between updates (default: {INTERVAL_S:g})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object about one interval and exit")
    return parser


def _interval(text: str) -> float:
    least, most = INTERVAL_S_RANGE
    try:
        interval_s = float(text)
    except ValueError:
        interval_s = 0.0
    if not least <= interval_s <= most:
        raise UsageError(f"--interval {text!r}: want seconds from {least:g} to {most:g}")
    return interval_s


@contextmanager
def _connected(text: str | None, *tls_files: str | None) -> Iterator[Daemon]:
    try:
        tls = TlsOptions(*tls_files)
        address = parse_address(default_address(os.geteuid(), os.environ) if text is None else text, tls)
        channel = open_channel(address, tls)
    except OptionError as error:
        raise UsageError(in_flags(str(error))) from error
    with channel:
        yield Daemon(address.target, tls.given, stub_of(channel, address))


def _one_view(daemon: Daemon, interval_s: float) -> View:
    before = daemon.ask()
    time.sleep(interval_s)
    return view_of(before, daemon.ask())


def _show(daemon: Daemon, interval_s: float) -> None:
    """Runs until q or a signal. The first screen covers the time since the daemon's start."""
    before = daemon.ask()
    view = view_of(weightd_pb2.StatsResponse(), before)
    due = time.monotonic() + interval_s
    with drawing() as terminal:
        while True:
            title = f"weightd at {daemon.address}, over {view.interval_s:.1f} s; q ends"
            lines = [title, *lines_of(view)]
            terminal.draw(lines, [_is_heading(line) for line in lines])
            event = terminal.wait(due - time.monotonic())
            if event is Event.QUIT:
                return
            if event is Event.TIME:
                after = daemon.ask()
                view, before = view_of(before, after), after
                due = time.monotonic() + interval_s


def _is_heading(line: str) -> bool:
    headings = [[heading for heading, _ in columns[:2]] for columns in (MODEL_COLUMNS, CLIENT_COLUMNS)]
    words = line.split()
    return words[:1] == ["weightd"] or words[:2] in headings
