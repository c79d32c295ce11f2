"""The daemon's log on standard error: lines for people, or one JSON object a line for programs.

Quiet by default: a line at the start, one for each model, warnings. What clients do is told at level debug. Names come
from stores and clients, so control characters are escaped: one event is one line, whatever its words are. Numbers of an
event stand beside its words, `logger.info("...", extra={"fields": {...}})`, and become keys of the object.
"""

from __future__ import annotations

import json
import logging
import sys
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


def configure(level: str, form: str) -> None:
    """Sends every logger of the process to standard error; `form` is "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("asyncio", "grpc"):  # at debug they tell of every turn of their loops
        logging.getLogger(name).setLevel(max(logging.INFO, logging.getLogger().level))


def one_line(text: str) -> str:
    """`text` with everything escaped that could end the line or move the cursor."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
