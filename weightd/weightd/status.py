"""Errors as gRPC statuses: the one table of the daemon, and what applies it to a call."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio

from weightd.errors import (
    CorruptionError,
    DeviceError,
    ForbiddenError,
    RequestError,
    SpaceError,
    StoppingError,
    StoreError,
    UnknownModelError,
)

logger = logging.getLogger(__name__)

Service = TypeVar("Service")
Request = TypeVar("Request")
Response = TypeVar("Response")
Context = grpc.aio.ServicerContext[Any, Any]

# The first row whose class fits counts, so a class stands above its parents.
STATUSES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (UnknownModelError, grpc.StatusCode.NOT_FOUND),
    (CorruptionError, grpc.StatusCode.DATA_LOSS),
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (ForbiddenError, grpc.StatusCode.PERMISSION_DENIED),
    (SpaceError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (MemoryError, grpc.StatusCode.RESOURCE_EXHAUSTED),
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


def answered(
    method: Callable[[Service, Request, Context], Awaitable[Response]],
) -> Callable[[Service, Request, Context], Awaitable[Response]]:
    """A call with one answer: what `method` returns, or the status of what it raises."""

    @functools.wraps(method)
    async def call(service: Service, request: Request, context: Context) -> Response:
        try:
            return await method(service, request, context)
        except Exception as error:
            await _refuse(context, error)

    return call


def answered_stream(
    method: Callable[[Service, Request, Context], AsyncIterator[Response]],
) -> Callable[[Service, Request, Context], AsyncIterator[Response]]:
    """The same for a call that answers with a stream."""

    @functools.wraps(method)
    async def call(service: Service, request: Request, context: Context) -> AsyncIterator[Response]:
        try:
            async for response in method(service, request, context):
                yield response
        except Exception as error:
            await _refuse(context, error)

    return call


async def _refuse(context: Context, error: Exception) -> NoReturn:
    status, details = status_of(error)
    if status in LOGGED:
        foreseen = any(isinstance(error, kind) for kind, _ in STATUSES)
        logger.error("%s", details, exc_info=None if foreseen else error)
    if len(details) > DETAILS_CHARACTERS_MAX:
        details = details[:DETAILS_CHARACTERS_MAX] + " ..."
    await context.abort(status, details)
