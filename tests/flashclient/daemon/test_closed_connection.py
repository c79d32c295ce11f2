"""Errors of a connection. One that is closed while another thread's call waits ends it, and nobody attaches again."""

from __future__ import annotations

import signal
import threading
import traceback
from pathlib import Path

import pytest
from daemon import Daemon, serving
from tiny_store import write_model

from flashclient.daemon.channel import Connection
from flashclient.errors import DaemonLostError, FlashClientError
from weightd_proto import weightd_pb2

TIMEOUT_S = 60.0


@pytest.mark.parametrize("call", ["stats", "fetch"])
def test_a_call_that_waits_ends_as_closed(tmp_path: Path, call: str) -> None:
    write_model(tmp_path / "store")
    with serving(tmp_path / "store") as daemon:
        connection = Connection(daemon.address, TIMEOUT_S)
        daemon.process.send_signal(signal.SIGSTOP)
        raised: list[BaseException] = []
        begun = threading.Event()

        def wait() -> None:
            begun.set()
            try:
                if call == "stats":
                    connection.stats()
                else:
                    b"".join(connection.fetch(weightd_pb2.FetchRequest(model="tiny", file="config.json")))
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        begun.wait()
        connection.close()  # before the call or during it: it ends alike
        thread.join(TIMEOUT_S / 2)
        daemon.process.send_signal(signal.SIGCONT)
    (error,) = raised
    assert type(error) is DaemonLostError
    assert str(error).endswith("was closed")


def failing(call: str, daemon: Daemon, connection: Connection) -> None:
    match call:
        case "no daemon":
            Connection("unix:/none", 1.0)
        case "no model":
            connection.describe("none")
        case "refused":
            b"".join(connection.fetch(weightd_pb2.FetchRequest(model="tiny", file="../none")))
        case "no session":
            connection.open_session(weightd_pb2.Model(name="none"), 1)
        case "lost":
            daemon.process.kill()
            daemon.process.wait()
            connection.stats()
        case "closed":
            connection.close()
            connection.stats()


@pytest.mark.parametrize("call", ["no daemon", "no model", "refused", "no session", "lost", "closed"])
def test_an_error_has_one_traceback(tmp_path: Path, call: str) -> None:
    """gRPC's own, which names its core's files, says nothing to a user."""
    write_model(tmp_path / "store")
    with serving(tmp_path / "store") as daemon:
        connection = Connection(daemon.address, TIMEOUT_S)
        with pytest.raises(FlashClientError) as raised:
            failing(call, daemon, connection)
        connection.close()
    text = "".join(traceback.format_exception(raised.value))
    assert "During handling" not in text
    assert "direct cause" not in text
