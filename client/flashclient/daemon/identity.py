"""Tells the daemon who calls over a Unix socket: see the head of proto/weightd.proto."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from weightd_proto.addresses import IDENTITY_METADATA_KEY, IDENTITY_SUFFIX

RENEW_S = 60.0  # so that joining a group has an effect soon
ANSWER_S = 2.0
IDENTITY_BYTES_MAX = 8192


class IdentifiedStub:
    """The calls of `stub`, each with the identity of this process as metadata.

    While the daemon is away, calls carry the last identity, which stays valid across the daemon's restart. (gRPC's
    interceptors could add the metadata, but they report a closed channel at another time and as another error.)
    """

    def __init__(self, stub: Any, socket_path: Path) -> None:
        """`socket_path`: the daemon's gRPC socket."""
        self._path = socket_path.with_name(socket_path.name + IDENTITY_SUFFIX)
        self._lock = threading.Lock()  # guards the fields below
        self._identity = b""
        self._renew_at = 0.0
        for name, method in vars(stub).items():
            setattr(self, name, partial(self._call, method))

    def _call(self, method: Callable[..., Any], request: Any, **options: Any) -> Any:
        identity = self._current()
        return method(request, metadata=[(IDENTITY_METADATA_KEY, identity)] if identity else None, **options)

    def _current(self) -> bytes:
        with self._lock:
            if time.monotonic() >= self._renew_at and (fresh := _ask(self._path)):
                self._identity, self._renew_at = fresh, time.monotonic() + RENEW_S
            return self._identity


def _ask(path: Path) -> bytes:
    """The identity that the daemon gives to this process; empty if it does not answer."""
    received = b""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_S)
            connection.connect(os.fsencode(path))
            while len(received) < IDENTITY_BYTES_MAX and (part := connection.recv(IDENTITY_BYTES_MAX)):
                received += part
    except OSError:
        return b""
    return received
