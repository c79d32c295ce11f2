"""The daemon's table of errors and gRPC statuses."""

from __future__ import annotations

import logging

import grpc

from weightd import _native
from weightd.errors import (
    BusyError,
    CorruptionError,
    DeviceError,
    ForbiddenError,
    LimitError,
    RequestError,
    SilenceError,
    SpaceError,
    StoppingError,
    StoreError,
    UnknownModelError,
)

logger = logging.getLogger(__name__)


# The first row that matches counts, so a class comes before its parents.
STATUSES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (UnknownModelError, grpc.StatusCode.NOT_FOUND),
    (_native.ModelRemoved, grpc.StatusCode.NOT_FOUND),  # since the call has found it
    (CorruptionError, grpc.StatusCode.DATA_LOSS),
    (LimitError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (ForbiddenError, grpc.StatusCode.PERMISSION_DENIED),
    (SpaceError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (MemoryError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (BusyError, grpc.StatusCode.ABORTED),
    (SilenceError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (StoppingError, grpc.StatusCode.UNAVAILABLE),
    (StoreError, grpc.StatusCode.FAILED_PRECONDITION),
    (DeviceError, grpc.StatusCode.INTERNAL),
    (OSError, grpc.StatusCode.INTERNAL),  # the device refused a read; trying again does not help
)
# These are logged, because the operator must act, not the caller.
LOGGED = (grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS)
# A status is sent in a header. Clients accept 8 KiB of headers, and a character may take nine bytes there. Only texts
# with a long name chosen by a caller are longer.
DETAILS_CHARACTERS_MAX = 800


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The gRPC status and the details of `error`."""
    for kind, status in STATUSES:
        if isinstance(error, kind):
            return status, str(error)
    return grpc.StatusCode.INTERNAL, f"a fault of weightd, see its log: {type(error).__name__}: {error}"


def refusal_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The same with bounded details, for a call that fails. Logs what the operator must know and frees the frames."""
    status, details = status_of(error)
    if status in LOGGED:
        foreseen = any(isinstance(error, kind) for kind, _ in STATUSES)
        logger.error("%s", details, exc_info=None if foreseen else error)
    _forget_frames(error)
    if len(details) > DETAILS_CHARACTERS_MAX:
        details = details[:DETAILS_CHARACTERS_MAX] + " ..."
    return status, details


def _forget_frames(error: BaseException | None) -> None:
    """Breaks reference cycles of an error and its frames, which would keep a request until the next collection."""
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
