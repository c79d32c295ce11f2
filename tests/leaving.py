"""Ways to leave a process that has a client, each in a process of its own: `python leaving.py ADDRESS MODEL`.

Forked from here, once everything is imported and before anything runs. Prints for each its exit status and standard
error, as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from flashclient import FlashClient

# isort: split
import torch
from transformers.generation.streamers import BaseStreamer

from flashclient.errors import ForkedError

ADDRESS, MODEL = sys.argv[1:3]
IDS = torch.arange(3, 15).unsqueeze(0)
ENDLESS: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 4000}
LEFT_WITHIN_S = 90
GRPC_NOTE = "fork_posix.cc"  # a line of gRPC's own, of a fork during a call
streams: list[Iterator[str]] = []  # they live until the interpreter clears the module


def made(transport: str = "auto") -> FlashClient:
    torch.set_num_threads(1)
    return FlashClient(MODEL, address=ADDRESS, transport=transport)


def generating(client: FlashClient, **of_thread: Any) -> threading.Thread:
    """A thread that generates until it is stopped; returns once it has begun."""
    begun = threading.Event()

    class Begun(BaseStreamer):
        def put(self, value: Any) -> None:
            begun.set()

        def end(self) -> None: ...

    def run() -> None:
        for _ in range(100):
            client.generate(IDS, streamer=Begun(), **ENDLESS)

    thread = threading.Thread(target=run, **of_thread)
    thread.start()
    begun.wait()
    return thread


def end_while_a_thread_generates() -> None:
    generating(made(), daemon=True)


def end_while_a_thread_generates_over_grpc() -> None:
    generating(made("grpc"), daemon=True)


def end_while_a_thread_calls_the_model() -> None:
    client, begun = made(), threading.Event()
    threading.excepthook = lambda *_: None  # it is told that the client was closed

    def run() -> None:
        while True:
            client.model(IDS)
            begun.set()

    threading.Thread(target=run, daemon=True).start()
    begun.wait()


def end_during_a_stream() -> None:
    streams.append(made().stream("hello", **ENDLESS))
    next(streams[0])


def leave_with_block_while_a_thread_generates() -> None:
    with made() as client:
        client.generate(IDS, max_new_tokens=2)
        thread = threading.Thread(target=lambda: [client.generate(IDS, max_new_tokens=20) for _ in range(10_000)])
        thread.daemon = True
        threading.excepthook = lambda *_: None  # it is told that the client is closed
        thread.start()
    thread.join()


def exit_in_a_callback() -> None:
    class Exits(BaseStreamer):
        def put(self, value: Any) -> None:
            sys.exit(3)

        def end(self) -> None: ...

    made().generate(IDS, streamer=Exits(), **ENDLESS)


def exit_at_once_while_a_thread_generates() -> None:
    generating(made(), daemon=True)
    os._exit(3)


def end_after_a_thread_that_is_no_daemon() -> None:
    client = made()
    threading.Thread(target=lambda: client.generate(IDS, max_new_tokens=200, eos_token_id=None)).start()


def _in_child(client: FlashClient) -> None:
    for use in (lambda: client.generate(IDS), lambda: client.model(IDS), lambda: client.stream("hello")):
        try:
            use()
        except ForkedError:
            continue
        raise AssertionError("a child used its parent's client")
    client.close()
    client.stats()


def fork_while_a_thread_generates() -> None:
    for transport in ("auto", "grpc"):
        client = made(transport)
        generating(client, daemon=True)
        context = multiprocessing.get_context("fork")
        for _ in range(3):
            child = context.Process(target=_in_child, args=(client,))
            child.start()
            child.join()
            assert child.exitcode == 0


def close_with_a_child_alive() -> None:
    client = made()
    client.generate(IDS, max_new_tokens=2)
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        os.read(reading, 1)  # until its parent has ended
        os._exit(0)
    client.close()
    with FlashClient(MODEL, address=ADDRESS) as other:
        until = time.monotonic() + LEFT_WITHIN_S
        while other.connection.stats().sessions > 1:
            assert time.monotonic() < until, "the session of a closed client is still there"
            time.sleep(0.01)


WAYS: list[Callable[[], None]] = [
    end_while_a_thread_generates,
    end_while_a_thread_generates_over_grpc,
    end_while_a_thread_calls_the_model,
    end_during_a_stream,
    leave_with_block_while_a_thread_generates,
    exit_in_a_callback,
    exit_at_once_while_a_thread_generates,
    end_after_a_thread_that_is_no_daemon,
    fork_while_a_thread_generates,
    close_with_a_child_alive,
]


def forked(way: Callable[[], None], error_file: int) -> int:
    pid = os.fork()
    if pid == 0:
        os.dup2(error_file, 2)
        way()  # what follows is the interpreter's own end
        sys.exit(0)
    return pid


def main() -> None:
    told = {}
    for way in WAYS:
        with tempfile.TemporaryFile() as errors:
            pid = forked(way, errors.fileno())
            _, status = os.waitpid(pid, 0)
            errors.seek(0)
            said = [line for line in errors.read().decode(errors="replace").splitlines() if GRPC_NOTE not in line]
        told[way.__name__] = [os.waitstatus_to_exitcode(status), said]
    print(json.dumps(told))


if __name__ == "__main__":
    main()
