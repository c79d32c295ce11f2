"""Ctrl-C while Python imports the modules of a command: nothing has begun that would have to be undone.

Python's own KeyboardInterrupt would end in a traceback there, or in the error of a half imported extension. These
functions do nothing outside the main thread, which alone gets signals.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

STATUS = 130  # by which shells know that a command was interrupted


def end_quietly() -> None:
    """From now on Ctrl-C ends the process at once, unless it is ignored, as in the background of a script."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and _in_main_thread():
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, if end_quietly() has changed that."""
    if signal.getsignal(signal.SIGINT) is _end and _in_main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end(_: int, __: FrameType | None) -> None:
    os._exit(STATUS)
