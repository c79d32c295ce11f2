"""What a server needs before it loads a model: its port, and a folder for what leaves memory."""

from __future__ import annotations

import argparse
import pwd
import socket
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from flashclient.cli import main
from flashclient.commands import opening, serve
from flashclient.errors import OptionError

OPTIONS: dict[str, Any] = {
    "models": ["m"],
    "host": "127.0.0.1",
    "port": 0,
    "store": None,
    "kept_folder": None,
    "kept_bytes": None,
    "kept_tokens": 10,
}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_second_of_two_servers_fails_before_it_loads(capsys: pytest.CaptureFixture[str], host: str) -> None:
    with serve._listening(argparse.Namespace(**OPTIONS)) as first:  # as one does that loads its model
        port = first.getsockname()[1]
        assert main(["serve", "m", "--host", host, "--port", str(port), "--address", "unix:/none"]) == 1
        with socket.create_connection(("127.0.0.1", port), timeout=10):  # a client that comes early waits
            pass
    assert capsys.readouterr().err == f"flashclient: cannot listen at {host}:{port}: address already in use\n"


def no_user(_: int) -> None:
    raise KeyError


@pytest.mark.parametrize("cache", ["/proc/none", None])
def test_a_server_that_can_keep_nothing_on_flash_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: str | None
) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_user)
    if cache is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
    with ExitStack() as opened:
        assert list(islice(serve._kept_files(argparse.Namespace(**OPTIONS), opened), 2)) == [None, None]
    told = capsys.readouterr().err
    assert told.startswith("flashclient: no file for kept keys and values")
    assert told.endswith(": pass --kept-folder\n")
    assert told.count("\n") == 1
    with pytest.raises(OptionError, match="--kept-folder"), ExitStack() as opened:
        next(serve._kept_files(argparse.Namespace(**OPTIONS | {"kept_bytes": 1 << 20}), opened))
    for nothing in ({"kept_bytes": 0}, {"kept_tokens": 0}):
        with ExitStack() as opened:
            assert next(serve._kept_files(argparse.Namespace(**OPTIONS | nothing), opened)) is None
    assert capsys.readouterr().err == ""


def test_run_without_a_home_says_what_to_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_user)
    assert main(["run", str(tmp_path)]) == 2
    assert "there is no home folder for a store of your own: pass --store, or set HOME" in capsys.readouterr().err


def test_a_server_says_at_once_that_it_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(*_: Any) -> None:
        raise OptionError("far enough")

    monkeypatch.setattr(opening, "_check_served", lambda *_: None)
    monkeypatch.setattr(opening, "_weightd_starting", ended)
    assert main(["serve", "m", "--port", "0"]) == 2
    assert capsys.readouterr().err == "flashclient: loading m\nflashclient: far enough\n"
