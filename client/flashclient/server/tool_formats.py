"""How families of models write calls of functions, as data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BETWEEN = re.compile(r"[\s;,]*")  # calls that follow each other without an end


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written: as JSON objects with a name and arguments, where nothing else is said.

    Attributes:
        signs: texts that are all in the chat templates of such models.
        other_signs: texts of templates of other formats, which have the same signs.
        begin, end: around calls. No end: that of the answer.
        arguments: the key of a call's arguments.
        listed: whether all calls are one JSON list.
        bare_json: whether an answer that begins with a brace is a call, too.
        name_end: what is between a call's name and the JSON of its arguments, where they follow each other.
        elements: whether a call is an element `<function=NAME>` with elements `<parameter=NAME>` in it, whose texts are
            values: those of strings as they are, others as JSON.
    """

    signs: Sequence[str]
    other_signs: Sequence[str]
    begin: str
    end: str
    arguments: str = "arguments"
    listed: bool = False
    bare_json: bool = False
    name_end: str = ""
    elements: bool = False

    def fits(self, template: str) -> bool:
        return all(sign in template for sign in self.signs) and not any(sign in template for sign in self.other_signs)

    @property
    def marks(self) -> set[str]:
        """Texts that may be special tokens."""
        return {self.begin, self.end, self.name_end}

    def read(self, text: str, parameters: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """The name and arguments of each call in what is between `begin` and `end`.

        Args:
            parameters: schemas of functions, by name.

        Raises:
            ValueError, KeyError, TypeError, RecursionError: it is something else.
        """
        if self.elements:
            return _elements(text, parameters)
        if self.name_end:
            return _named(text, self.begin, self.name_end)
        return [(value["name"], value.get("arguments", value.get("parameters", {}))) for value in _values(text)]

    def ends_within_value(self, held: str, since: int, at: int) -> bool:
        """Whether an end of a call at `at` is within a value, so that more text may complete the call.

        Args:
            held: text from `begin` on.
            since: behind the last end before that was within a value; 0: there was none.
        """
        if self.elements:  # what was read before is not read again
            opened, closed = (held.rfind(mark, since, at) for mark in ("<parameter=", "</parameter>"))
            return opened > closed or (opened == closed and since > 0)
        try:
            _values(held[len(self.begin) : at])
        except json.JSONDecodeError as error:
            return error.msg.startswith("Unterminated string")
        except (ValueError, RecursionError):
            pass
        return False


FORMATS = (  # Hermes and Qwen, Mistral, Llama 3, newer Mistral, Qwen's Coder
    ToolFormat(("<tool_call>", "tools"), ("<function=", "<arg_key>"), "<tool_call>", "</tool_call>"),
    ToolFormat(("[TOOL_CALLS]", "tools"), ("[ARGS]",), "[TOOL_CALLS]", "", listed=True),
    ToolFormat(('"parameters"', "tools"), ("<function=",), "<|python_tag|>", "", "parameters", bare_json=True),
    ToolFormat(("[TOOL_CALLS]", "[ARGS]", "tools"), ("[CALL_ID]",), "[TOOL_CALLS]", "", name_end="[ARGS]"),
    ToolFormat(("<tool_call>", "<function=", "<parameter=", "tools"), (), "<tool_call>", "</tool_call>", elements=True),
)


def format_of(template: str) -> ToolFormat | None:
    """The format of a chat template; None where it takes no tools, or its calls cannot be read."""
    return next((one for one in FORMATS if one.fits(template)), None)


def _values(text: str) -> list[Any]:
    """JSON values that follow each other; those of a list are its elements. Raises ValueError, RecursionError."""
    decoder, at, values = json.JSONDecoder(), _after_space(text, 0), []
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        values += value if isinstance(value, list) else [value]
        at = _after_space(text, at)
    return values


def _after_space(text: str, at: int) -> int:
    return BETWEEN.match(text, at).end()  # type: ignore[union-attr]


def _named(text: str, begin: str, name_end: str) -> list[tuple[str, Any]]:
    decoder, at, calls = json.JSONDecoder(), 0, []
    while (at := _after_space(text, at)) < len(text):
        following = text.index(name_end, at)
        name = text[at:following].strip().removeprefix(begin).strip()
        value, at = decoder.raw_decode(text, _after_space(text, following + len(name_end)))
        calls.append((name, value))
    return calls


FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*(?=<function=|$)", re.DOTALL)
PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*(?=<parameter=|$)", re.DOTALL)


def _elements(text: str, parameters: Mapping[str, Any]) -> list[tuple[str, Any]]:
    calls, at = [], 0
    while at < len(text):
        found = FUNCTION.match(text, at)
        if found is None:
            raise ValueError(text[at:])
        name, inside = found.groups()
        calls.append((name, _parameters(inside, parameters[name])))
        at = found.end()
    return calls


def _parameters(text: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    known = schema.get("properties")
    values, at, text = {}, 0, text.strip()
    while at < len(text):
        found = PARAMETER.match(text, at)
        if found is None:
            raise ValueError(text[at:])
        one = known.get(found[1]) if isinstance(known, dict) else None
        values[found[1]] = element_value(found[2], one if isinstance(one, dict) else {}, schema)
        at = found.end()
    return values


def element_value(text: str, schema: Mapping[str, Any], whole: Mapping[str, Any]) -> Any:
    """A parameter's value: JSON, or text where the schema wants a string, and no value of the JSON's type."""
    if schema.get("type") == "string":
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    types = _types(schema, whole)
    return value if "string" not in types or types & set(TYPES[type(value)]) else text


TYPES = {
    str: ["string"],
    bool: ["boolean"],
    int: ["integer", "number"],
    float: ["number"],
    list: ["array"],
    dict: ["object"],
    type(None): ["null"],
}
SCHEMAS_MAX = 64  # that are looked at for one value, and of the values and types that each lists


def _types(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> set[str]:
    """The types of the values that a schema allows, as far as it tells. `whole`: the function's schema."""
    left, types, looked = [schema], set[str](), 0
    while looked < min(len(left), SCHEMAS_MAX):
        one, looked = left[looked], looked + 1
        given = one.get("type")
        types.update(kind for kind in [given, *_listed(given)] if isinstance(kind, str))
        for value in [*_listed(one.get("enum")), *([one["const"]] if "const" in one else [])]:
            types.update(TYPES[type(value)])
        others = [other for word in ("anyOf", "oneOf", "allOf") for other in _listed(one.get(word))]
        left += [other for other in [*others, _referred(one, whole)] if isinstance(other, dict)]
    return types


def _listed(value: Any) -> list[Any]:
    return value[:SCHEMAS_MAX] if isinstance(value, list) else []


def _referred(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> Any:
    """The definition in a function's schema to which one in it refers; None where there is none."""
    kind, _, name = str(schema.get("$ref")).removeprefix("#/").partition("/")
    definitions = whole.get(kind) if kind in ("$defs", "definitions") else None
    return definitions.get(name) if isinstance(definitions, dict) else None
