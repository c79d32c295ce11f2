"""Shows the daemon who calls, over a Unix socket: see the head of proto/weightd.proto."""

from __future__ import annotations

import socket
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

SOCKET_SUFFIX = ".peer"
METADATA_KEY = "weightd-identity-bin"
RENEW_S = 60.0  # so that joining a group soon has an effect
ANSWER_S = 2.0
IDENTITY_BYTES_MAX = 8192

_Details = namedtuple("_Details", ("method", "timeout", "metadata", "credentials", "wait_for_ready", "compression"))


class ClientCallDetails(_Details, grpc.ClientCallDetails):
    """What gRPC hands to an interceptor is read-only; this is a copy with more metadata."""


class IdentityInterceptor(
    grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamUnaryClientInterceptor
):
    """Adds the identity to every call. A daemon that is away is met with the last one, which outlives its restart."""

    def __init__(self, socket_path: Path) -> None:
        """`socket_path`: of the daemon's gRPC."""
        self._path = socket_path.with_name(socket_path.name + SOCKET_SUFFIX)
        self._lock = threading.Lock()  # guards what follows
        self._identity = b""
        self._renew_at = 0.0

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(self._shown(details), request)

    def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(self._shown(details), request)

    def intercept_stream_unary(self, continuation: Callable[..., Any], details: Any, requests: Any) -> Any:
        return continuation(self._shown(details), requests)

    def _shown(self, details: Any) -> ClientCallDetails:
        identity = self._current()
        metadata = [*(details.metadata or ()), *([(METADATA_KEY, identity)] if identity else [])]
        return ClientCallDetails(
            details.method,
            details.timeout,
            metadata,
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )

    def _current(self) -> bytes:
        with self._lock:
            if time.monotonic() >= self._renew_at and (fresh := _ask(self._path)):
                self._identity, self._renew_at = fresh, time.monotonic() + RENEW_S
            return self._identity


def _ask(path: Path) -> bytes:
    """What the daemon says of this process; nothing where it does not answer."""
    received = b""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_S)
            connection.connect(str(path))
            while len(received) < IDENTITY_BYTES_MAX and (part := connection.recv(IDENTITY_BYTES_MAX)):
                received += part
    except OSError:
        return b""
    return received
