"""Errors as gRPC statuses: the one table of the daemon."""

from __future__ import annotations

import logging

import grpc

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


# The first row whose class fits counts, so a class stands above its parents.
STATUSES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (UnknownModelError, grpc.StatusCode.NOT_FOUND),
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
    (OSError, grpc.StatusCode.INTERNAL),  # a read that the device refused; asking again is of no use
)
# Worth a line in the log: the operator must act, not the caller.
LOGGED = (grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS)
# A status travels in a header, of which clients take 8 KiB, and a character may become nine bytes there. What is longer
# names something that a caller made long.
DETAILS_CHARACTERS_MAX = 800


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status and the line with which `error` crosses gRPC."""
    for kind, status in STATUSES:
        if isinstance(error, kind):
            return status, str(error)
    return grpc.StatusCode.INTERNAL, f"a fault of weightd, see its log: {type(error).__name__}: {error}"


def refusal_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The same for a call that ends with it, in a short line; logs what the operator must know, forgets the frames."""
    status, details = status_of(error)
    if status in LOGGED:
        foreseen = any(isinstance(error, kind) for kind, _ in STATUSES)
        logger.error("%s", details, exc_info=None if foreseen else error)
    _forget_frames(error)
    if len(details) > DETAILS_CHARACTERS_MAX:
        details = details[:DETAILS_CHARACTERS_MAX] + " ..."
    return status, details


def _forget_frames(error: BaseException | None) -> None:
    """Frames hold requests, and futures that hold the error: what is over would stay until the collector comes by."""
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
