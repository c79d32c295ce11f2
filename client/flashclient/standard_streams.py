"""The standard streams of a command: closed ones, a full disk, a pipe without a reader, an ASCII locale."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class OutputError(Exception):
    """Standard output cannot be written."""


def fill() -> None:
    """Opens /dev/null in place of closed standard streams.

    Otherwise the next file or socket would get one of their numbers, and libraries would write error messages into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def run(program: str, command: Callable[[], int]) -> int:
    """The exit status of `command`, which prints with say(); 1, with one line, when its output cannot be written."""
    fill()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed when Python started
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        adapt: Any = getattr(stream, "reconfigure", None)
        if adapt is not None:
            adapt(errors="backslashreplace")  # names and texts may have characters that the locale's encoding lacks
    try:
        try:
            return command()
        except SystemExit:  # of --help
            say("", end="")
            raise
    except OutputError as error:
        cause = error.__cause__
        assert isinstance(cause, OSError)
        if cause.errno != errno.EPIPE:  # a reader may stop early
            complain(program, f"cannot write to standard output: {(cause.strerror or str(cause)).lower()}")
        return 1
    finally:
        try:
            sys.stderr.flush()
        except OSError:
            _drop(2)


def say(text: str, end: str = "\n") -> None:
    """Writes to standard output and flushes it. Raises OutputError."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        _drop(1)
        raise OutputError from error


def complain(program: str, text: str) -> None:
    """Writes one line to standard error, if that can be written."""
    try:
        print(f"{program}: {text}", file=sys.stderr, flush=True)
    except OSError:
        _drop(2)


def _drop(descriptor: int) -> None:
    """Points the descriptor at /dev/null: the rest of Python's buffer would fail again at exit."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
