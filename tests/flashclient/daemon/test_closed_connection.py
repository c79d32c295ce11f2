"""A connection that is closed while another thread's call waits: the call ends, and nobody tries to attach again."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
from daemon import serving
from tiny_store import write_model

from flashclient.daemon.channel import Connection
from flashclient.errors import DaemonLostError
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
