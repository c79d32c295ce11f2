"""The daemon's log: one event is one line, for people and for programs."""

from __future__ import annotations

import json
import logging
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from daemon import refused, serving
from tiny_store import write_model

from weightd import log
from weightd_proto import weightd_pb2 as pb


def record(message: str, *arguments: object, level: int = logging.INFO, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("weightd", level, __file__, 1, message, arguments, None)
    made.__dict__ |= more
    return made


@pytest.mark.parametrize("name", ["a\nb", "a\r\x1b[2Jb", "a\u2028b", "a\x00b", "a\u202eb"])
def test_names_never_break_lines(name: str) -> None:
    text = log.TextLines().format(record("model %s", name))
    assert text.isprintable()
    assert text.startswith("weightd: model a\\")
    line = log.JsonLines().format(record("model %s", name, fields={"model": name}))
    assert line.isprintable()
    assert json.loads(line)["model"] == name


def test_text_says_what_is_a_warning() -> None:
    assert log.TextLines().format(record("so")) == "weightd: so"
    assert log.TextLines().format(record("so", level=logging.WARNING)) == "weightd: warning: so"


def test_fields_cannot_take_the_place_of_the_words() -> None:
    line = json.loads(log.JsonLines().format(record("so", fields={"message": "other", "reads": 3})))
    assert (line["message"], line["reads"], line["level"]) == ("so", 3, "info")


def test_a_fault_keeps_its_traceback() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        fault = record("it failed", level=logging.ERROR, exc_info=sys.exc_info())
    assert "broken" in json.loads(log.JsonLines().format(fault))["exception"]
    assert "Traceback" in log.TextLines().format(fault)


def test_json_lines_of_a_daemon(tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_model(store)
    with serving(store, "--dram", "64MiB", "--log-format", "json") as daemon:
        write_model(store, name="late")
        for _ in range(3):
            daemon.stub.DescribeModel(pb.DescribeModelRequest(name="late"))
            daemon.stub.OpenSession(pb.OpenSessionRequest(model="tiny"))
        _, text = daemon.stop()
    start, opened, end = [json.loads(line) for line in text.splitlines()]
    assert (start["level"], start["models"], start["dram_bytes"]) == ("info", ["tiny"], 64 << 20)
    assert (opened["level"], opened["model"]) == ("info", "late")
    assert end["message"] == "stopping"


def test_a_quiet_daemon_says_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "store")
    with serving(tmp_path / "store", "--dram", "64MiB", "--log-level", "warning") as daemon:
        assert daemon.stop() == (0, "")


def test_a_refusal_is_a_line_of_the_log_too(tmp_path: Path) -> None:
    status, text = refused(tmp_path / "none", "--listen", f"unix:{tmp_path}/w.sock", "--log-format", "json")
    assert status == 1
    line = json.loads(text)
    assert line["level"] == "error"
    assert "none" in line["message"]


STRANGERS = """
import os, sys, threading, warnings
from weightd import log
log.configure("info", "json")
os.write(2, b"E1128 13:05:45.158929   16755 parse_address.cc:69] no address\\nI1128 13:05:46.000000   1 a.cc:1] so\\n")
warnings.warn("old", stacklevel=1)
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
class Unraisable:
    def __del__(self):
        raise ValueError("late")
Unraisable()
print("Traceback", "of somebody", sep="\\n", file=sys.stderr, flush=True)
log.configure("info", "text")
os.write(2, b"plain again\\n")
log.configure("info", "json")
os.write(2, b"the last words")
log.finish()
"""


def test_what_others_write_is_a_json_line_too() -> None:
    done = subprocess.run([sys.executable, "-c", STRANGERS], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert lines.count("plain again") == 1
    events = [json.loads(line) for line in lines if line != "plain again"]
    said = [(event["logger"], event["level"], event["message"].split("]")[-1].strip()) for event in events]
    assert ("stderr", "error", "no address") in said
    assert ("stderr", "info", "so") in said
    assert [name for name, level, _ in said if level == "warning"] == ["py.warnings"]
    assert [event["message"] for event in events if event["logger"] == "stderr"][-3:] == [
        "Traceback",
        "of somebody",
        "the last words",
    ]
    faults = [event["exception"] for event in events if "exception" in event]
    assert ["ZeroDivisionError" in fault or "ValueError: late" in fault for fault in faults] == [True, True]


def test_bytes_of_a_client_never_get_into_the_log(tmp_path: Path) -> None:
    """gRPC's core would log a connection error with the text that the client sent for it."""
    store = tmp_path / "store"
    write_model(store)
    with serving(store, "--dram", "64MiB", "--log-format", "json") as daemon:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(daemon.address.removeprefix("unix:"))
            words = b"\nweightd: serving nothing\n"
            go_away = struct.pack(">IBIII", len(words) + 8 << 8 | 7, 0, 0, 0, 1) + words  # with error 1
            ping = b"\0\0\x08\6\0\0\0\0\0" + b"answered"  # once gRPC has read what is before it
            client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" + go_away + ping)
            said = b""
            while b"answered" not in said and (more := client.recv(1 << 16)):
                said += more
        _, written = daemon.stop()
    assert [json.loads(line)["message"].split()[0] for line in written.splitlines()] == ["serving", "stopping"]
