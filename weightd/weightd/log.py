"""The daemon's log on standard error: lines for people, or one JSON object a line for programs.

Quiet by default: a line at the start, one for each model, warnings. What clients do is told at level debug. Names come
from stores and clients, so control characters are escaped: one event is one line, whatever its words are. Numbers of an
event stand beside its words, `logger.info("...", extra={"fields": {...}})`, and become keys of the object.

Where programs read it, each line is an object, also of what others say: warnings and faults of Python are events, and
descriptor 2 leads through a pipe, so that the lines of gRPC's core are, too. (Of a crash in native code the last words
may be lost there.)
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

# JSON keys that every line has; fields of an event cannot take them.
RESERVED = ("time", "level", "logger", "message", "exception")


class TextLines(logging.Formatter):
    """`weightd: words`, as all commands print errors; warnings say so. The traceback of a fault stands below."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno in (logging.DEBUG, logging.WARNING) else ""
        line = f"weightd: {level}{one_line(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonLines(logging.Formatter):
    """{"time": RFC 3339 in UTC, "level", "logger", "message", fields..., "exception" of a fault}."""

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
    """While it lasts, what is written to descriptor 2 becomes events, a line each, and `stream` is standard error."""

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
        os.dup2(self.stream.fileno(), 2)  # the last writing end of the pipe: the thread ends
        self._thread.join()


_LEVELS = {"I": logging.INFO, "W": logging.WARNING}
_capture: _Capture | None = None


def _abseil_level(line: str) -> str:
    """The letter of a line like `I1128 13:05:45.158929   16755 parse_address.cc:69] ...`; empty for others."""
    return line[0] if re.match(r"[IWEF]\d{4} ", line) else ""


def configure(level: str, form: str) -> None:
    """Sends every logger of the process to standard error; `form` is "text" or "json". It may be called again."""
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
    logging.raiseExceptions = False  # a standard error that takes nothing is no event, and told nowhere
    logging.captureWarnings(True)
    threading.excepthook = _tell_of_thread
    sys.unraisablehook = _tell_of_unraisable
    for name in ("asyncio", "grpc"):  # at debug they tell of every turn of their loops
        logging.getLogger(name).setLevel(max(logging.INFO, logging.getLogger().level))


def finish() -> None:
    """Before the process ends: all that was written to descriptor 2 is in the log then."""
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
    """`text` with everything escaped that could end the line or move the cursor."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
