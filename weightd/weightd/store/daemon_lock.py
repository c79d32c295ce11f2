"""weightd.lock: which daemon serves a store.

The daemon holds the flock of the file as long as it lives. The file says its pid and address, for other processes.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from weightd.closing import Closing
from weightd.errors import StoreError
from weightd_proto.files import DAEMON_LOCK_FILE


class DaemonLock(Closing):
    """The lock of the store at `store_path`. Callers of `claim` and `holder` hold the store's own lock."""

    def __init__(self, store_path: Path) -> None:
        self._store_path = store_path
        self._path = store_path / DAEMON_LOCK_FILE
        self._descriptor: int | None = None

    def claim(self, address: str) -> None:
        """Takes the lock until `close`. StoreError if another daemon has it, or if the file cannot be written."""
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(
                f"cannot serve {self._store_path}: its {DAEMON_LOCK_FILE} cannot be written ({error.strerror}); make "
                "the store writable, on a file system that is not read-only"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, other = _record(descriptor)
            os.close(descriptor)
            raise StoreError(
                f"{self._store_path} is served by another weightd, pid {pid} at {other}: use that one or stop it first"
            ) from None
        os.ftruncate(descriptor, 0)
        readable = os.fsencode(address).decode(errors="replace")  # whatever the locale of the reader
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "address": readable}).encode(), 0)
        self._descriptor = descriptor

    def holder(self) -> str | None:
        """The address of the daemon that has the lock, if one does."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _record(descriptor)[1]
        finally:
            os.close(descriptor)
        return None

    def close(self) -> None:
        """Gives the lock back, if it was taken."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _record(descriptor: int) -> tuple[str, str]:
    """Pid and address of the daemon, as texts for an error. If the file is damaged, the texts say so."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):
        record = None
    known = record if isinstance(record, dict) else {}
    unknown = f"unknown ({DAEMON_LOCK_FILE} is damaged)"
    return str(known.get("pid", unknown)), str(known.get("address", f"an address that {DAEMON_LOCK_FILE} lacks"))
