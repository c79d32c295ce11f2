"""Errors of the interface. All have one shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from flashclient.errors import BusyError, FlashClientError, OptionError

RETRY_AFTER_S = 1


class Problem(Exception):
    """A request cannot be answered.

    Args:
        status: of HTTP.
        param: the field of the request that is the cause.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @classmethod
    def of(cls, error: Exception) -> Problem:
        """An error of the library."""
        if isinstance(error, Problem):
            return error
        if isinstance(error, BusyError):
            return cls(429, str(error), code="too_many_requests")
        if isinstance(error, OptionError):
            return cls(400, str(error))
        if isinstance(error, FlashClientError):
            return cls(503, str(error), code="unavailable")
        return cls(500, f"{type(error).__name__}: the server has an error; its log says more", code="internal")

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}

    def as_dict(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
