"""/health tells a server whose models compute from one with a model whose thread has ended."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from fastapi.testclient import TestClient

from flashclient.batching.scheduler import Scheduler
from flashclient.server.access import Access
from flashclient.server.api import make_api


def hosted(thread: threading.Thread) -> Any:
    """A model whose scheduler has this thread."""
    scheduler = object.__new__(Scheduler)
    scheduler._thread, scheduler._refused = thread, None
    return SimpleNamespace(scheduler=scheduler)


def test_a_model_that_computes_no_more_is_told() -> None:
    ended = threading.Thread()
    ended.start()
    ended.join()
    runs = threading.current_thread()
    with TestClient(make_api({"a": hosted(runs), "b": hosted(runs)}, Access()), "http://localhost") as asking:
        assert (asking.get("/health").status_code, asking.get("/health").json()) == (200, {"status": "ok"})
    with TestClient(make_api({"a": hosted(runs), "b": hosted(ended)}, Access()), "http://localhost") as asking:
        answer = asking.get("/health")
        assert answer.status_code == asking.head("/health").status_code == 503
        assert answer.json()["error"] == {
            "message": "the model computes no more requests: start the server again",
            "type": "server_error",
            "param": None,
            "code": "unavailable",
        }
