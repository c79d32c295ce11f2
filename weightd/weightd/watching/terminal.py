"""A terminal that a command draws on until a key or signal ends it, and whose state is restored afterwards."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from types import FrameType

SIZE_DEFAULT = os.terminal_size((80, 24))  # if the terminal does not report its size
KEYS_BYTES = 64  # read at once
QUIT_KEYS = (b"q", b"Q")

ENTER_SCREEN = "\x1b[?1049h\x1b[?25l"  # the alternate screen, without a cursor
LEAVE_SCREEN = "\x1b[?25h\x1b[?1049l"
HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
BOLD, PLAIN = "\x1b[1m", "\x1b[m"


class Event(Enum):
    """What ended a wait."""

    TIME = "time"
    RESIZED = "resized"
    QUIT = "quit"


class Terminal:
    """Standard output as a screen, and standard input as a keyboard if it is a terminal too."""

    def __init__(self, signals_fd: int) -> None:
        self._signals_fd = signals_fd
        self._keys_fd = sys.stdin.fileno() if sys.stdin.isatty() else None

    def draw(self, lines: Sequence[str], bold: Sequence[bool]) -> None:
        """Replaces the screen's contents. Lines are cut to its width, and their number to its height."""
        width, height = self._size()
        shown = [
            f"{BOLD}{line[:width]}{PLAIN}" if strong else line[:width] for line, strong in zip(lines, bold, strict=True)
        ]
        if len(shown) > height:
            shown = [*shown[: height - 1], f"... {len(shown) - height + 1} more lines"[:width]]
        sys.stdout.write(HOME + f"{CLEAR_LINE}\n".join(shown) + CLEAR_LINE + CLEAR_BELOW)
        sys.stdout.flush()

    def wait(self, seconds: float) -> Event:
        """Waits until the time is over, the terminal's size has changed, or the user wants to quit."""
        watched = [self._signals_fd] if self._keys_fd is None else [self._signals_fd, self._keys_fd]
        ready, _, _ = select.select(watched, [], [], max(0.0, seconds))
        if self._signals_fd in ready:
            os.read(self._signals_fd, KEYS_BYTES)
            return Event.RESIZED
        if self._keys_fd not in ready or self._keys_fd is None:
            return Event.TIME
        keys = os.read(self._keys_fd, KEYS_BYTES)
        ends = not keys or any(key in keys for key in QUIT_KEYS)  # no bytes: the terminal has closed
        return Event.QUIT if ends else Event.RESIZED  # any other key redraws the screen

    def _size(self) -> os.terminal_size:
        size = os.get_terminal_size(sys.stdout.fileno())
        return size if size.columns and size.lines else SIZE_DEFAULT


@contextmanager
def drawing() -> Iterator[Terminal]:
    """Shows the terminal's alternate screen. SIGINT and SIGTERM raise KeyboardInterrupt inside."""
    with ExitStack() as undo:
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        undo.callback(os.close, reading)
        undo.callback(os.close, writing)

        # Python runs a handler only between two of its instructions, so a signal that arrives just before `select`
        # begins would not end it. The wakeup descriptor is written as soon as the signal arrives.
        undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writing, warn_on_full_buffer=False))
        undo.callback(signal.signal, signal.SIGWINCH, signal.signal(signal.SIGWINCH, _caught))
        undo.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.default_int_handler))
        if sys.stdin.isatty():
            before = termios.tcgetattr(sys.stdin)
            undo.callback(termios.tcsetattr, sys.stdin, termios.TCSANOW, before)
            tty.setcbreak(sys.stdin)
        sys.stdout.write(ENTER_SCREEN)
        undo.callback(_leave_screen)
        yield Terminal(reading)


def _caught(number: int, frame: FrameType | None) -> None:
    """Does nothing. Without a handler, the signal would not be written to the wakeup descriptor."""


def _leave_screen() -> None:
    sys.stdout.write(LEAVE_SCREEN)
    sys.stdout.flush()
