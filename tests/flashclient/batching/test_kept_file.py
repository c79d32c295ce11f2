"""The file of keys and values on a device that fails: nothing is raised, and each kind of fault is told once."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from flashclient.batching import kept_file
from flashclient.batching.kept_file import PAGE_BYTES, KeptFile
from flashclient.batching.timed_calls import TimedCalls

STATES = [(torch.ones(1, 10, PAGE_BYTES // 40), torch.zeros(1, 1, 1))]  # two pages


@pytest.mark.parametrize(
    ("call", "number", "line"),
    [
        ("preadv", errno.EIO, "kept keys and values are computed again: input/output error"),
        ("pwritev", errno.EIO, "no more than 0 MiB is kept: input/output error"),
        ("pwritev", errno.ENOSPC, "no more than 0 MiB is kept: no space left on device"),
        ("pwritev", errno.EROFS, "no more than 0 MiB is kept: read-only file system"),
    ],
)
def test_a_device_that_fails_again_and_again_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str, number: int, line: str
) -> None:
    def failing(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, failing)
    monkeypatch.setattr(kept_file, "RETRY_S", 0.0)
    file = KeptFile(tmp_path, 10 * PAGE_BYTES)
    for _ in range(3):
        place = file.write(STATES)
        assert (place is None) == (call == "pwritev")
        if place is not None:
            assert file.read(place) is None
            file.free(place)
    file.close()
    assert caplog.messages == [f"{tmp_path}: {line}"]
    assert file.damaged == (3 if call == "preadv" else 0)


def test_a_device_that_was_full_is_asked_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    now_s, works = 1000.0, os.pwritev
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    file = KeptFile(tmp_path, 10 * PAGE_BYTES)
    monkeypatch.setattr(os, "pwritev", full)
    assert file.write(STATES) is None
    monkeypatch.setattr(os, "pwritev", works)
    assert not file.may_hold(STATES)
    now_s += kept_file.RETRY_S
    assert file.has_room(STATES)
    place = file.write(STATES)
    assert place is not None
    assert file.read(place) is not None
    file.close()


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_a_device_that_hangs_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    works, answers, calls = getattr(os, call), threading.Event(), []

    def hanging(*arguments: Any) -> int:
        calls.append(arguments)
        assert answers.wait(60)
        return int(works(*arguments))

    monkeypatch.setattr(kept_file, "RETRY_S", 0.0)
    file = KeptFile(tmp_path, 10 * PAGE_BYTES)
    places = [file.write(STATES) for _ in range(3)]
    monkeypatch.setattr(os, call, hanging)
    monkeypatch.setattr(file._timed, "_within_s", 0.2)
    for place in places:
        assert place is not None
        assert (file.read(place) if call == "preadv" else file.write(STATES)) is None
    assert len(calls) == 1
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith("the device gave no answer within 0.2 s")
    monkeypatch.setattr(file._timed, "_within_s", 60.0)
    answers.set()
    assert file._timed._last is not None
    assert file._timed._last.done.wait(60)
    for place in places:
        assert place is not None
        read = file.read(place)
        assert read is not None
        assert torch.equal(read[0][0], STATES[0][0])
    assert file.write(STATES) is not None
    file.close()


def test_an_error_of_any_kind_reaches_the_caller_and_ends_nothing() -> None:
    calls, made = TimedCalls(60.0), []

    def fail() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        calls(fail)
    calls(lambda: made.append(1))
    assert made == [1]
    calls.close()
