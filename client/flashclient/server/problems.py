"""Errors of the interface. All have one shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from flashclient.errors import BusyError, FlashClientError, OptionError

SOON = {"Retry-After": "1"}
MORE_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: SOON, 503: SOON}
FAULTS_MAX = 1000  # describing millions of them, to tell one, would take many seconds
# Fields of other servers or of former versions of the interface, and what does the same here.
SAME_HERE = {
    "function_call": "tool_choice",
    "functions": "tools",
    "grammar": "response_format",
    "guided_json": "response_format",
    "json_schema": "response_format",
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "n_probs": "logprobs",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
}

# By a field that an endpoint lacks: one that was sent instead, and the endpoint that takes it.
OTHER_ENDPOINT = {"prompt": ("messages", "/v1/chat/completions"), "messages": ("prompt", "/v1/completions")}


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
        """That clients of HTTP act on, whatever the body says."""
        return MORE_HEADERS.get(self.status, {})

    def as_dict(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refused(error: ValidationError, body: bytes) -> Problem:
    """The fault of a body that says most.

    Where a field may have one of several forms, that is a fault other than the form, and else one that lies deepest.
    """
    if error.error_count() > FAULTS_MAX:
        return Problem(400, f"the body has {error.error_count()} faults: see which fields this endpoint takes")
    faults = error.errors(include_url=False, include_context=False)
    if faults[0]["type"] == "json_invalid":
        return Problem(400, f"the body is not JSON: {faults[0]['msg']}", code="invalid_json")
    given: Any = None
    with suppress(ValueError, RecursionError):
        given = json.loads(body)
    paths = [_path(fault["loc"], fault["type"] == "missing", given) for fault in faults]
    forms = [fault["type"].endswith(("_type", "_parsing", "literal_error")) for fault in faults]
    _, _, chosen = min((form, -len(path), number) for number, (form, path) in enumerate(zip(forms, paths, strict=True)))
    path, fault = paths[chosen], faults[chosen]
    where, param = ".".join(path) or "the body", path[0] if path else None
    if fault["type"] == "extra_forbidden":
        remedy = f"use {SAME_HERE[where]}" if where in SAME_HERE else "leave it out"
        return Problem(400, f"this server does not know {where}: {remedy}", param, "unknown_parameter")
    other, endpoint = OTHER_ENDPOINT.get(where, ("", ""))
    if fault["type"] == "missing" and isinstance(given, dict) and other in given:
        return Problem(400, f"this endpoint takes {where}: send {other} to {endpoint}", other)
    return Problem(400, f"{where}: {fault['msg'][:1].lower()}{fault['msg'][1:]}", param)


def _path(place: tuple[int | str, ...], missing: bool, given: Any) -> list[str]:
    """The keys that lead to a fault, or to what is missing. The place also names the forms that were tried."""
    path = []
    for number, key in enumerate(place, start=1):
        in_object = isinstance(given, dict) and key in given
        if in_object or (isinstance(given, list) and isinstance(key, int) and key < len(given)):
            given = given[key]
        elif not (missing and number == len(place)):
            continue
        path.append(str(key))
    return path
