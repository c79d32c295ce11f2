"""Calls of functions whose arguments are given out while they are made: those that begin with the name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from flashclient.server.tool_formats import ToolFormat, element_value

NAME = r"([a-zA-Z0-9_.-]{1,64})"
SPACE = r"\s{0,64}"  # bounded, because what may go on is read again with every token
PARAMETER_BEGIN = re.compile(rf"{SPACE}<parameter=([^>\n]+)>(\n?)")
FUNCTION_END = re.compile(rf"{SPACE}</function>")
PARAMETER_END = re.compile(rf"\n?</parameter>{SPACE}")
NEXT_PARAMETER, NEXT_FUNCTION, END_OF_FUNCTION, END_OF_CALLS = (
    "<parameter=",
    "<function=",
    "</function>",
    "</tool_call>",
)


class OpenCall(Protocol):
    """A call whose arguments come.

    Attributes:
        done: whether it has ended.
    """

    done: bool

    def take(self, text: str) -> tuple[str, str]:
        """What more text adds to the arguments, and the text that follows the call."""
        ...

    def end(self) -> tuple[str, str]:
        """The same at the end of the answer."""
        ...


@dataclass(frozen=True)
class Opening:
    """The beginning of a call: its function, the characters that it takes, and its arguments to come."""

    name: str
    length: int
    call: OpenCall


def opening(form: ToolFormat, held: str, parameters: Mapping[str, Any]) -> Opening | None:
    """The call that a text begins with. None where it is none, or must be read whole.

    Args:
        parameters: schemas of functions, by name.
    """
    found = _beginning(form).match(held)
    if found is None or found[1] not in parameters:
        return None
    call = ElementCall(parameters[found[1]]) if form.elements else JsonCall(0 if form.name_end else 1)
    return Opening(found[1], found.end(), call)


@cache
def _beginning(form: ToolFormat) -> re.Pattern[str]:
    begin = f"(?:{re.escape(form.begin)})?{SPACE}"
    if form.elements:
        return re.compile(rf"{begin}<function={NAME}>{SPACE}(?=<parameter=[^>\n]+>|</function>)")
    if form.name_end:
        return re.compile(rf"{begin}{NAME}{SPACE}{re.escape(form.name_end)}{SPACE}(?=\{{)")
    key = r'"(?:arguments|parameters)"'
    before = rf'\[?{SPACE}\{{{SPACE}"name"{SPACE}:{SPACE}"{NAME}"{SPACE},{SPACE}{key}{SPACE}:{SPACE}(?=\{{)'
    return re.compile(begin + before)


class JsonCall:
    """A call whose arguments are an object, as it is written.

    Args:
        around: objects that are around the arguments; what follows in them is left out.
    """

    def __init__(self, around: int) -> None:
        self._around = self._depth = around
        self._given = self._in_text = self._escaped = self.done = False

    def take(self, text: str) -> tuple[str, str]:
        """See OpenCall."""
        end = 0 if self._given else len(text)
        for at, character in enumerate(text):
            if self._in_text:
                self._in_text = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == self._around and not self._given:
                    self._given, end = True, at + 1
                if self._depth == 0:
                    self.done = True
                    return text[:end], text[at + 1 :]
        return text[:end], ""

    def end(self) -> tuple[str, str]:
        """See OpenCall."""
        return "", ""


class ElementCall:
    """A call whose arguments are elements `<parameter=NAME>`, given out as an object.

    Args:
        schema: of the arguments. Texts are given out while they are made, other values when they have ended.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        known = schema.get("properties")
        self._known: Mapping[str, Any] = known if isinstance(known, dict) else {}
        self._held = ""
        self._searched = 0  # characters of it that hold no end of a parameter
        self._value: Mapping[str, Any] | None = None  # the schema of the parameter that is open
        self._some = self.done = False

    def take(self, text: str) -> tuple[str, str]:
        """See OpenCall."""
        return self._advance(text, last=False)

    def end(self) -> tuple[str, str]:
        """See OpenCall."""
        return self._advance("", last=True)

    def _advance(self, text: str, last: bool) -> tuple[str, str]:
        self._held += text
        given = ""
        while not self.done:
            piece = self._inside(last) if self._value is not None else self._between(last)
            if piece is None:
                return given, ""
            given += piece
        rest, self._held = self._held, ""
        return given, rest

    def _between(self, last: bool) -> str | None:
        """Begins a parameter, or ends the call; None where more text is needed."""
        if (found := PARAMETER_BEGIN.match(self._held)) is not None:
            if found.end() == len(self._held) and not found[2] and not last:
                return None
            schema = self._known.get(found[1])
            self._value = schema if isinstance(schema, dict) else {}
            self._held = self._held[found.end() :]
            begin = f"{', ' if self._some else '{'}{_json(found[1])}: "
            self._some = True
            return begin + ('"' if self._is_text else "")
        if (found := FUNCTION_END.match(self._held)) is not None:
            self._held, self.done = self._held[found.end() :], True
            return "}" if self._some else "{}"
        return None

    @property
    def _is_text(self) -> bool:
        return self._value is not None and self._value.get("type") == "string"

    def _inside(self, last: bool) -> str | None:
        """What is known of the open value; None where more text is needed."""
        assert self._value is not None
        safe, stop, ended = self._found(last)
        self._searched = 0 if ended or self._is_text else safe
        if not ended:
            if not self._is_text or safe == 0:
                return None
            piece, self._held = self._held[:safe], self._held[safe:]
            return _json(piece)[1:-1]
        piece, self._held = self._held[:safe], self._held[stop:]
        written = f'{_json(piece)[1:-1]}"' if self._is_text else _json(element_value(piece, self._value, self._schema))
        self._value = None
        return written

    def _found(self, last: bool) -> tuple[int, int, bool]:
        """The characters that are certainly of the value; behind its end, if it has one; and whether it has."""
        for found in PARAMETER_END.finditer(self._held, self._searched):
            follows = True if last and found.end() == len(self._held) else _follows(self._held[found.end() :])
            if follows or (follows is None and last):
                return found.start(), found.end(), True
            if follows is None:
                return found.start(), 0, False
        if last:
            return len(self._held), 0, False
        ends = range(min(len(MARK) - 1, len(self._held)), 0, -1)
        partial = next((n for n in ends if any(mark.startswith(self._held[-n:]) for mark in (MARK, MARK[1:]))), 0)
        return len(self._held) - partial, 0, False


MARK = "\n</parameter>"


def _follows(text: str) -> bool | None:
    """Whether a text behind a parameter's end shows that it is one; None: more is needed."""
    if text.startswith(NEXT_PARAMETER):
        name = text[len(NEXT_PARAMETER) :].partition(">")
        return None if not name[1] and "\n" not in name[0] else bool(name[0]) and "\n" not in name[0]
    if text.startswith(END_OF_FUNCTION):
        after = text[len(END_OF_FUNCTION) :].lstrip()
        if any(mark.startswith(after) for mark in (NEXT_FUNCTION, END_OF_CALLS)):
            return None if after not in (NEXT_FUNCTION, END_OF_CALLS) else True
        return after.startswith((NEXT_FUNCTION, END_OF_CALLS))
    return None if any(mark.startswith(text) for mark in (NEXT_PARAMETER, END_OF_FUNCTION)) else False


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
