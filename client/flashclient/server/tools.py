"""Functions that a model may call: grammars of calls, and a reader of texts that have some."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flashclient.batching.constraint import JSON_SPACE
from flashclient.server.open_calls import OpenCall, opening
from flashclient.server.problems import Problem
from flashclient.server.tool_formats import ToolFormat

CALLS_MAX = 16  # of an answer that must call
VALUE_END = "\n</parameter>\n"
TEXT = f"text[suffix={json.dumps(VALUE_END)}]: /(?s:.*)/"  # a parameter that is text, and its end
READ_AGAIN_CHARACTERS_MAX = 4 << 20  # of an answer; a read takes up to 33 ns a character, and all streams wait for it
ID_CHARACTERS = 9  # templates of Mistral take no other number


@dataclass(frozen=True)
class ToolCall:
    """A call. `arguments` is JSON, or its beginning: then more follows in pieces."""

    name: str
    arguments: str

    def described(self) -> dict[str, Any]:
        """As the OpenAI interface tells it, with a new id."""
        called = {"name": self.name, "arguments": self.arguments}
        return {"id": uuid.uuid4().hex[:ID_CHARACTERS], "type": "function", "function": called}


@dataclass(frozen=True)
class ArgumentsPiece:
    """More of the arguments of the last call."""

    text: str


Found = str | ToolCall | ArgumentsPiece


@dataclass(frozen=True)
class ToolSet:
    """The functions of a request.

    Attributes:
        parameters: the JSON schema of each function's arguments, by its name.
        required: whether the answer must call one.
        single_call: whether it may call no more than one.
    """

    format: ToolFormat
    parameters: Mapping[str, Any]
    required: bool
    single_call: bool

    def markers(self, tokenizer: Any) -> dict[int, str]:
        """Special tokens that are around calls; decoding would leave them out."""
        marks = self.format.marks & set(tokenizer.all_special_tokens)
        return {int(tokenizer.convert_tokens_to_ids(mark)): mark for mark in marks}

    def grammar(self, tokenizer: Any, answer: Any = None) -> str:
        """A grammar of answers that call. With `answer`, a JSON schema, also of those that are JSON of it."""
        form, special = self.format, {mark: token for token, mark in self.markers(tokenizer).items()}
        most = 1 if self.single_call else CALLS_MAX

        def mark(text: str) -> str:
            return f"<[{special[text]}]>" if text in special else _quoted(text)

        if form.elements or form.name_end:
            rules = self._named_rules(mark)
        else:
            calls: dict[str, Any] = {"anyOf": [self._call(name) for name in self.parameters]}
            if form.listed:
                calls = {"type": "array", "items": calls, "minItems": 1, "maxItems": most}
            written = 'begin "\\n" calls "\\n" end' if form.end else "calls" if form.bare_json else "begin calls"
            rules = [
                f"one: {written}",
                *((f"begin: {mark(form.begin)}",) if "begin" in written else ()),
                *((f"end: {mark(form.end)}",) if form.end else ()),
                f"calls: {_json_rule(calls)}",
            ]
        again = f"{_quoted(chr(10))} one" if form.end else "one" if form.name_end else ""
        lines = [f"start: one ({again}){{0,{most - 1}}}" if again and most > 1 else "start: one", *rules]
        if answer is not None:
            lines[0] += " | answer"
            lines.append(f"answer: {_json_rule(answer)}")
        return "\n".join(lines)

    def _named_rules(self, mark: Callable[[str], str]) -> list[str]:
        """Rules of `one` call, by function."""
        form, rules = self.format, []
        for number, (name, schema) in enumerate(self.parameters.items()):
            rule, schema = f"call_{number}", _with_own_references(name, schema)
            if form.name_end:
                rules.append(f"{rule}: {mark(form.begin)} {_quoted(name)} {mark(form.name_end)} {_json_rule(schema)}")
                continue
            known = schema.get("properties") if isinstance(schema.get("properties"), dict) else {}
            given = []
            for place, (key, value) in enumerate((known or {}).items()):
                own: dict[str, Any] = {word: schema[word] for word in ("$id", "$defs", "definitions") if word in schema}
                text = isinstance(value, dict) and value.get("type") == "string" and "enum" not in value
                inside = "text" if text else f"{_element_value(value, own)} {_quoted(VALUE_END)}"
                rules.append(f"{rule}_{place}: {_quoted(f'<parameter={key}>{chr(10)}')} {inside}")
                given.append(f"{rule}_{place}" + ("" if key in schema.get("required", ()) else "?"))
            opening, closing = f"{chr(10)}<function={name}>{chr(10)}", f"</function>{chr(10)}"
            inside = " ".join([_quoted(opening), *given, _quoted(closing)])
            rules.append(f"{rule}: {mark(form.begin)} {inside} {mark(form.end)}")
        rules += [TEXT] if form.elements else []
        return [f"one: {' | '.join(f'call_{number}' for number in range(len(self.parameters)))}", *rules]

    def _call(self, name: str) -> dict[str, Any]:
        arguments = _with_own_references(name, self.parameters[name])
        return {
            "type": "object",
            "properties": {"name": {"const": name}, self.format.arguments: arguments},
            "required": ["name", self.format.arguments],
            "additionalProperties": False,
        }


def _with_own_references(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function, whose references are to itself wherever it is put."""
    named = {"$id": f"tool:/{name}"} if "$defs" in schema or "definitions" in schema else {}
    return named | dict(schema)


def _json_rule(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_SPACE})}"


def _element_value(schema: Any, own: Mapping[str, Any]) -> str:
    """What a parameter that is not just text may be."""
    values = schema.get("enum") if isinstance(schema, dict) and schema.get("type") == "string" else None
    if values and all(isinstance(value, str) for value in values):
        return f"({' | '.join(map(_quoted, values))})"
    return _json_rule({**own, **(schema if isinstance(schema, dict) else {})})


class ToolReader:
    """Separates calls from the text around them. What only looks like a call stays text.

    A call that begins with the name of a function is one whatever follows, and its arguments are given out as they
    come: they may be cut, or no JSON. Others are read when they have ended.

    What ends within a value, or has another beginning in it, is read again. After READ_AGAIN_CHARACTERS_MAX the rest of
    the answer is text.
    """

    def __init__(self, tools: ToolSet) -> None:
        self._tools = tools
        self._held = ""  # text that may become a call, or the space before one
        self._inside = False
        self._searched = 0  # characters of the held text in which no end of a call begins
        self._within = 0  # behind the last end that was within a value
        self._read_again = 0  # characters
        self._begun = False  # whether text was given out
        self._after = False  # whether all since a call is space
        self._open_call: OpenCall | None = None
        self._behind = False  # whether all is behind a call, before the end of the calls
        self._left_out = False  # whether the last call is one too many
        self.calls = 0
        self.is_cut = False  # whether the answer has ended within a call

    def add(self, text: str) -> list[Found]:
        """What is known after more of the answer."""
        self._held += text
        found: list[Found] = []
        while (more := self._next()) is not None:
            found += more
        return found

    def rest(self) -> list[Found]:
        """What was held back, at the end of the answer."""
        begin, end = self._tools.format.begin, self._tools.format.end
        found: list[Found] = []
        if self._open_call is not None:
            found += self._taken_by(self._open_call, *self._open_call.end())
            self.is_cut = self._open_call is not None
            if self.is_cut:
                return found
        if self._behind:
            text, self._held = self._held.strip(" \n\t;,]" if self._tools.format.listed else None), ""
            return [*found, text] if text else found
        while self._inside and end and (following := self._held.find(begin, 1)) > 0:
            self._read_again += len(self._held)  # a string in a call was never closed
            found += [self._taken(following), *self.add("")]
        held, self._held = self._held, ""
        if self._inside:
            calls = None if end else self._read(held.removeprefix(begin))
            return found + (self._given(calls) if calls is not None else [held])
        return found + ([held] if held and not (held.isspace() and self._after) else [])

    def _next(self) -> list[Found] | None:
        """The next text or calls; None where more of the answer is needed."""
        form = self._tools.format
        if self._read_again > READ_AGAIN_CHARACTERS_MAX:
            self._inside = False
            return [self._taken(len(self._held))] if self._held else None
        if self._open_call is not None:
            held, self._held = self._held, ""
            found = self._taken_by(self._open_call, *self._open_call.take(held))
            return found if found or self._open_call is None else None
        if self._inside:
            return self._opened() or (self._next_behind() if self._behind else self._next_calls())
        if self._after:
            self._held = self._held.lstrip()
            self._after = not self._held
        if form.bare_json and not self._begun and self._held.lstrip().startswith("{"):
            self._inside = True
            return []
        before, mark, _ = self._held.partition(form.begin)
        if not mark:
            before = self._held[: len(self._held) - _partial_marker(self._held, form.begin)]
        before = before.rstrip()  # the space before a call is not part of the text
        if mark:
            self._inside = True
            self._held = self._held[self._held.index(form.begin) :]
            return [before] if before else []
        if not before:
            return None
        self._held = self._held[len(before) :]
        self._begun = True
        return [before]

    def _opened(self) -> list[Found] | None:
        """The call that begins here. Empty where it is one too many."""
        if self._behind:
            self._held = self._held.lstrip(" \n\t;,")
        begun = opening(self._tools.format, self._held, self._tools.parameters)
        if begun is None:
            return None
        self._taken(begun.length)
        self._open_call, self._behind = begun.call, False
        found = self._given([ToolCall(begun.name, "")])
        self._left_out = not found
        return found or [""]

    def _taken_by(self, call: OpenCall, piece: str, rest: str) -> list[Found]:
        """What a call took, and the text behind it."""
        if call.done:
            self._open_call, self._behind, self._held, self._searched = None, True, rest, 0
        return [ArgumentsPiece(piece)] if piece and not self._left_out else []

    def _next_behind(self) -> list[Found] | None:
        """The end of calls; None where more of the answer is needed."""
        end = self._tools.format.end
        at = self._held.find(end, self._searched) if end else -1
        if at < 0:
            self._searched = max(0, len(self._held) - len(end) + 1)
            return None
        text = self._taken(at).strip()
        self._taken(len(end))
        self._inside, self._behind, self._after = False, False, True
        return [text]

    def _next_calls(self) -> list[Found] | None:
        form = self._tools.format
        while form.end and (at := self._held.find(form.end, self._searched)) >= 0:
            self._searched = at + 1
            if form.ends_within_value(self._held, self._within, at):
                self._within = at + 1
                self._read_again += 0 if form.elements else at
                if self._read_again > READ_AGAIN_CHARACTERS_MAX:
                    return []
                continue
            calls = self._read(self._held[len(form.begin) : at])
            if calls is not None:
                self._taken(at + len(form.end))
                self._inside, self._after = False, True
                return self._given(calls)
            following = self._held.find(form.begin, 1, at)  # nothing behind it makes it a call; this may be one
            self._inside = following > 0
            self._read_again += at if self._inside else 0
            return [self._taken(following if self._inside else at + len(form.end))]
        self._searched = max(self._searched, len(self._held) - len(form.end) + 1)
        return None

    def _taken(self, length: int) -> str:
        """Takes the first characters of what is held."""
        text, self._held, self._searched = self._held[:length], self._held[length:], 0
        self._within = 0
        return text

    def _given(self, calls: list[ToolCall]) -> list[Found]:
        if self._tools.single_call:
            calls = calls[: 1 - self.calls]
        self.calls += len(calls)
        return [*calls]

    def _read(self, text: str) -> list[ToolCall] | None:
        """The calls of a text; None where it is something else."""
        try:
            calls = [self._call(*call) for call in self._tools.format.read(text, self._tools.parameters)]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return calls or None

    def _call(self, name: str, arguments: Any) -> ToolCall:
        if name not in self._tools.parameters:
            raise ValueError(name)
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def joined(found: Iterable[Found]) -> list[ToolCall]:
    """The calls, whole."""
    calls: list[ToolCall] = []
    for one in found:
        if isinstance(one, ToolCall):
            calls.append(one)
        elif isinstance(one, ArgumentsPiece):
            calls[-1] = ToolCall(calls[-1].name, calls[-1].arguments + one.text)
    return calls


def with_parsed_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of the history as chat templates take it: the arguments of its calls are objects, not JSON."""
    calls = message.get("tool_calls")
    if not calls:
        return {name: value for name, value in message.items() if name != "tool_calls"}
    try:
        parsed = [_parsed(call) for call in calls]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = "a message's tool_calls need a function with a name, and arguments that are JSON of an object"
        raise Problem(400, text, "messages") from None
    return {**message, "tool_calls": parsed}


def _parsed(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict) or not isinstance(function["name"], str):
        raise ValueError(arguments)
    return {**call, "function": {**function, "arguments": arguments}}


def _quoted(text: str) -> str:
    return json.dumps(text)


def _partial_marker(text: str, mark: str) -> int:
    """The length of the longest end of `text` that is the beginning of `mark`."""
    ends = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((length for length in ends if mark.startswith(text[-length:])), 0)
