"""The daemon's log on standard error: lines for people, or one JSON object per line for programs.

The log is short by default: a line at the start, a line per model, and warnings. Actions of clients are logged at level
debug. Names come from stores and clients, so control characters are escaped and every event stays on one line. An event
passes numbers as `logger.info("...", extra={"fields": {...}})`; they become keys of the JSON object.

In JSON form every line is an object, including lines that other code writes: Python's warnings and uncaught exceptions
are logged as events, and descriptor 2 is a pipe whose lines become events, because gRPC's core writes there. If native
code crashes, its last lines may be lost in that pipe.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from typing import Any

# JSON keys that the log sets itself; fields of an event cannot replace them.
RESERVED = ("time", "level", "logger", "message", "exception")


class TextLines(logging.Formatter):
    """Lines like `weightd: warning: message`. The traceback of an exception follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno in (logging.DEBUG, logging.WARNING) else ""
        line = f"weightd: {level}{one_line(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonLines(logging.Formatter):
    """{"time": RFC 3339 in UTC, "level", "logger", "message", fields..., "exception": a traceback, if there is one}."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields: dict[str, Any] = getattr(record, "fields", {})
        line |= {key: value for key, value in fields.items() if key not in RESERVED}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Capture:
    """Turns each line written to descriptor 2 into an event, until end(). `stream` is the real standard error."""

    def __init__(self) -> None:
        self.stream = os.fdopen(os.dup(2), "w", errors="backslashreplace")
        reading_end, writing_end = os.pipe()
        os.dup2(writing_end, 2)
        os.close(writing_end)
        self._thread = threading.Thread(target=self._run, args=(reading_end,), name="weightd-stderr", daemon=True)
        self._thread.start()

    def _run(self, reading_end: int) -> None:
        with os.fdopen(reading_end, errors="backslashreplace") as lines:
            for line in filter(None, map(str.rstrip, lines)):
                logging.getLogger("stderr").log(_LEVELS.get(_abseil_level(line), logging.ERROR), "%s", line)

    def end(self) -> None:
        os.dup2(self.stream.fileno(), 2)  # closes the pipe's last writing end, which ends the thread
        self._thread.join()


_LEVELS = {"I": logging.INFO, "W": logging.WARNING}
_capture: _Capture | None = None


def _abseil_level(line: str) -> str:
    """The level's letter of a line of gRPC's core like `I1128 13:05:45.158929   16755 file.cc:69] ...`, else empty."""
    return line[0] if re.match(r"[IWEF]\d{4} ", line) else ""


def configure(level: str, form: str) -> None:
    """Sends every logger of the process to standard error. `form` is "text" or "json". Can be called again."""
    global _capture
    before = _capture
    finish()
    if form == "json":
        _capture = _Capture()
    handler = logging.StreamHandler(sys.stderr if _capture is None else _capture.stream)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if before is not None:
        before.stream.close()
    logging.raiseExceptions = False  # if standard error cannot be written, there is nowhere to report that
    logging.captureWarnings(True)
    threading.excepthook = _tell_of_thread
    sys.unraisablehook = _tell_of_unraisable
    for name in ("asyncio", "grpc"):  # at debug they log every turn of their loops
        logging.getLogger(name).setLevel(max(logging.INFO, logging.getLogger().level))


def finish() -> None:
    """Writes out what descriptor 2 still holds. Call it before the process ends."""
    global _capture
    if _capture is not None:
        capture, _capture = _capture, None
        capture.end()


def _tell_of_thread(fault: Any) -> None:
    name = fault.thread.name if fault.thread is not None else "that has ended"
    logging.getLogger("weightd").error("a fault in thread %s", name, exc_info=fault.exc_value)


def _tell_of_unraisable(fault: Any) -> None:
    message = fault.err_msg or "ignored"
    logging.getLogger("weightd").error("a fault %s, in %r", message, fault.object, exc_info=fault.exc_value)


def one_line(text: str) -> str:
    """`text` with every character escaped that could end the line or move the cursor."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
