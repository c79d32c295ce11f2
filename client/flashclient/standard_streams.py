"""The standard streams of a command, whatever they are: closed, a full disk, a pipe that nobody reads, plain ASCII."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class OutputError(Exception):
    """Standard output takes no more."""


def fill() -> None:
    """Opens /dev/null in place of those standard streams that are closed.

    Else the next file or socket gets one of their numbers, and what any library says on standard error goes there.
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
            adapt(errors="backslashreplace")  # for names and texts that the locale's encoding cannot write
    try:
        try:
            return command()
        except SystemExit:  # of --help
            say("", end="")
            raise
    except OutputError as error:
        cause = error.__cause__
        assert isinstance(cause, OSError)
        if cause.errno != errno.EPIPE:  # a reader that had enough is no fault
            complain(program, f"cannot write to standard output: {(cause.strerror or str(cause)).lower()}")
        return 1
    finally:
        try:
            sys.stderr.flush()
        except OSError:
            _drop(2)


def say(text: str, end: str = "\n") -> None:
    """Writes to standard output, now. Raises OutputError."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        _drop(1)
        raise OutputError from error


def complain(program: str, text: str) -> None:
    """One line on standard error, if it takes it."""
    try:
        print(f"{program}: {text}", file=sys.stderr, flush=True)
    except OSError:
        _drop(2)


def _drop(descriptor: int) -> None:
    """What is still in Python's buffer would fail once more at exit."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
