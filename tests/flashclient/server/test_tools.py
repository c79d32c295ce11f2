"""Calls of functions in texts: each format, whole and in pieces; what only looks like a call; texts that must call."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from checkpoints import VOCABULARY, make_tokenizer

from flashclient.batching.constraint import Grammars
from flashclient.batching.sampling import Sampler, Sampling
from flashclient.server import tool_formats
from flashclient.server.problems import Problem
from flashclient.server.tool_formats import FORMATS, format_of
from flashclient.server.tools import (
    READ_AGAIN_CHARACTERS_MAX,
    ArgumentsPiece,
    ToolCall,
    ToolReader,
    ToolSet,
    joined,
    with_parsed_arguments,
)

HERMES, MISTRAL, LLAMA, NAMED, ELEMENTS = FORMATS
PARAMETERS: dict[str, Any] = {
    "rain": {
        "type": "object",
        "properties": {"place": {"$ref": "#/$defs/place"}},
        "required": ["place"],
        "additionalProperties": False,
        "$defs": {"place": {"enum": ["Bern", "</tool_call>"]}},
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
RAIN = ToolCall("rain", '{"place": "Bern"}')
NOW = ToolCall("now", "{}")


def tools_of(form: Any, **more: Any) -> ToolSet:
    return ToolSet(form, PARAMETERS, **({"required": False, "single_call": False} | more))


def read(tools: ToolSet, text: str, chance: random.Random | None = None) -> list[Any]:
    """What is read of a text, given whole or in random pieces; neighbouring texts are one, and calls are whole."""
    reader, found, at = ToolReader(tools), [], 0
    while at < len(text):
        size = len(text) if chance is None else chance.randint(1, 9)
        found += reader.add(text[at : at + size])
        at += size
    joined: list[Any] = []
    for one in found + reader.rest():
        if isinstance(one, ArgumentsPiece):
            joined[-1] = ToolCall(joined[-1].name, joined[-1].arguments + one.text)
        elif joined and isinstance(one, str) and isinstance(joined[-1], str):
            joined[-1] += one
        elif one:
            joined.append(one)
    return joined


ONE = '{"name": "rain", "arguments": {"place": "Bern"}}'
XML = "<tool_call>\n<function=rain>\n<parameter=place>\nBern\n</parameter>\n</function>\n</tool_call>"
TWO = '{"name": "now", "arguments": {}}'


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", [RAIN]),
        (
            HERMES,
            f"Let me see.\n\n<tool_call>{ONE}</tool_call>\n<tool_call>{TWO}</tool_call>\n",
            ["Let me see.", RAIN, NOW],
        ),
        (HERMES, f"<tool_call>{ONE}</tool_call> Done. ", [RAIN, "Done. "]),
        (HERMES, " Just <b> text <tool", [" Just <b> text <tool"]),
        (HERMES, f"<tool_call>{ONE[:-9]}", [ToolCall("rain", '{"place":')]),  # cut by max_tokens
        (HERMES, f"<tool_call>{ONE[:30]}", [f"<tool_call>{ONE[:30]}"]),
        (HERMES, "<tool_call>{}</tool_call>", ["<tool_call>{}</tool_call>"]),
        (HERMES, '<tool_call>{"name": "rm"}</tool_call>', ['<tool_call>{"name": "rm"}</tool_call>']),
        (HERMES, f"<tool_call>{'[' * 5000}</tool_call>", [f"<tool_call>{'[' * 5000}</tool_call>"]),
        (
            HERMES,
            '<tool_call>{"name": "rain", "arguments": {"place": "</tool_call>"}}</tool_call>',
            [ToolCall("rain", '{"place": "</tool_call>"}')],
        ),
        (HERMES, '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', [NOW]),
        (HERMES, f"<tool_call>{{}}</tool_call>\n<tool_call>{ONE}</tool_call>", ["<tool_call>{}</tool_call>", RAIN]),
        (
            HERMES,
            f"<tool_call>{{<tool_call>{ONE}</tool_call><tool_call>{TWO}",
            ["<tool_call>{", RAIN, NOW],
        ),
        (HERMES, f'<tool_call>{{"a</tool_call><tool_call>{TWO}</tool_call>', ['<tool_call>{"a</tool_call>', NOW]),
        (HERMES, "<tool_call></tool_call>Sorry. ", ["<tool_call></tool_call>Sorry. "]),
        (MISTRAL, f"[TOOL_CALLS][{ONE}, {TWO}]", [RAIN, NOW]),
        (MISTRAL, f"[TOOL_CALLS] [{ONE}]\n", [RAIN]),
        (MISTRAL, "No [TOOL", ["No [TOOL"]),
        (LLAMA, ONE.replace("arguments", "parameters"), [RAIN]),
        (LLAMA, f"<|python_tag|>{TWO}; {ONE}", [NOW, RAIN]),
        (LLAMA, '{"a": 1}', ['{"a": 1}']),
        (LLAMA, 'It is {"a": 1}', ['It is {"a": 1}']),
        (NAMED, '[TOOL_CALLS]rain[ARGS]{"place": "Bern"}', [RAIN]),
        (NAMED, 'Well.[TOOL_CALLS]rain[ARGS]{"place": "Bern"}[TOOL_CALLS] now [ARGS] {}', ["Well.", RAIN, NOW]),
        (
            NAMED,
            '[TOOL_CALLS]rain[ARGS]{"place": "[TOOL_CALLS]now[ARGS]"}',
            [ToolCall("rain", '{"place": "[TOOL_CALLS]now[ARGS]"}')],
        ),
        (NAMED, '[TOOL_CALLS]rm[ARGS]{"place": "Bern"}', ['[TOOL_CALLS]rm[ARGS]{"place": "Bern"}']),
        (NAMED, "[TOOL_CALLS]rain", ["[TOOL_CALLS]rain"]),
        (ELEMENTS, XML, [RAIN]),
        (ELEMENTS, f"So:\n{XML}\n<tool_call>\n<function=now>\n</function>\n</tool_call>", ["So:", RAIN, NOW]),
        (
            ELEMENTS,
            XML.replace("Bern", "a\n<b></tool_call>\n</c>"),
            [ToolCall("rain", '{"place": "a\\n<b></tool_call>\\n</c>"}')],
        ),
        (ELEMENTS, XML.replace("Bern", "[1, 2]"), [ToolCall("rain", '{"place": "[1, 2]"}')]),
        (ELEMENTS, XML.replace("rain", "rm"), [XML.replace("rain", "rm")]),
        (ELEMENTS, XML[:-20], [ToolCall("rain", '{"place": "Bern"')]),
        (ELEMENTS, XML[: XML.index("rn")], [ToolCall("rain", '{"place": ')]),
    ],
)
def test_calls_are_read(form: Any, text: str, expected: list[Any]) -> None:
    assert read(tools_of(form), text) == expected
    for seed in range(20):
        assert read(tools_of(form), text, random.Random(seed)) == expected


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, f"Well.<tool_call>{ONE}</tool_call><tool_call>{TWO}</tool_call>"),
        (MISTRAL, f"Well.[TOOL_CALLS][{ONE}, {TWO}]"),
        (LLAMA, f"{ONE}; {TWO}"),
        (NAMED, 'Well.[TOOL_CALLS]rain[ARGS]{"place": "Bern"}[TOOL_CALLS]now[ARGS]{}'),
        (ELEMENTS, f"Well.{XML}<tool_call><function=now></function></tool_call>"),
    ],
)
def test_arguments_come_while_they_are_made(form: Any, text: str) -> None:
    place = {"type": "object", "properties": {"place": {"type": "string"}}}
    tools = ToolSet(form, {"rain": place, "now": {}}, required=False, single_call=False)
    reader, so_far = ToolReader(tools), ""
    for at, character in enumerate(text):
        for one in reader.add(character):
            if isinstance(one, ToolCall):
                assert (one.arguments, so_far) == ("", '{"place": "Bern"}' if one.name == "now" else "")
            elif isinstance(one, ArgumentsPiece):
                so_far += one.text
        if text[:at].endswith("Ber"):
            assert so_far in ('{"place": "Be', '{"place": "Ber', '{"place": "Bern')
    assert so_far == '{"place": "Bern"}{}'
    reader.rest()
    assert (reader.calls, reader.is_cut) == (2, False)


def test_no_call_is_given_out_at_its_end() -> None:
    assert ToolReader(tools_of(HERMES)).add("<tool_call>{}</tool_call>So") == ["<tool_call>{}</tool_call>", "So"]


def test_one_call_where_one_is_wanted() -> None:
    assert read(tools_of(HERMES, single_call=True), f"<tool_call>{ONE}</tool_call><tool_call>{TWO}</tool_call>") == [
        RAIN
    ]
    assert read(tools_of(MISTRAL, single_call=True), f"[TOOL_CALLS][{ONE}, {TWO}]") == [RAIN]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("one", [False, True])
def test_random_texts_that_must_call(form: Any, one: bool) -> None:
    tokenizer = make_tokenizer()
    special = {id(MISTRAL): ["[TOOL_CALLS]"], id(NAMED): ["[TOOL_CALLS]", "[ARGS]"]}.get(id(form), [])
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": special})
    tools = tools_of(form, required=True, single_call=one)
    markers = tools.markers(tokenizer)
    assert len(markers) == len(special)
    constraint = Grammars(tokenizer, VOCABULARY, [2]).lark(tools.grammar(tokenizer))
    for seed in range(4):
        random_of, mine = torch.Generator().manual_seed(seed), constraint.copy()
        sampler, tokens = Sampler(Sampling(seed=seed), [5], mine), []
        while not mine.complete:
            tokens.append(sampler.pick(torch.randn(VOCABULARY, generator=random_of)).token)
        text = "".join(markers.get(one) or str(tokenizer.decode([one], skip_special_tokens=True)) for one in tokens)
        calls = read(tools, text)
        assert calls
        assert all(isinstance(call, ToolCall) and call.name in PARAMETERS for call in calls)
        assert {json.loads(call.arguments).get("place") for call in calls} <= {None, "Bern", "</tool_call>"}
        assert len(calls) == 1 or not one


@pytest.mark.parametrize(
    ("value", "loud"), [("if a < b:\n    c = '</d>'\n", "true"), ("", None), ("</parameter", "false")]
)
def test_any_text_may_be_a_parameter_of_an_element(value: str, loud: str | None) -> None:
    say = {
        "type": "object",
        "properties": {"text": {"type": "string"}, "loud": {"type": "boolean"}},
        "required": ["text"],
    }
    tools = ToolSet(ELEMENTS, {"say": say}, required=True, single_call=True)
    tokenizer = make_tokenizer()
    constraint = Grammars(tokenizer, VOCABULARY, [2]).lark(tools.grammar(tokenizer))
    parameters = {"text": value} | ({} if loud is None else {"loud": loud})
    written = "".join(f"<parameter={key}>\n{given}\n</parameter>\n" for key, given in parameters.items())
    text = f"<tool_call>\n<function=say>\n{written}</function>\n</tool_call>"
    for token in tokenizer.encode(text, add_special_tokens=False):
        assert constraint.allowed()[token], (tokenizer.decode([token]), text)
        constraint.take(token)
    (call,) = read(tools, text)
    assert json.loads(call.arguments) == {"text": value} | ({} if loud is None else {"loud": loud == "true"})


OPEN = "<tool_call>\n<function=rain>\n<parameter=place>\n"
END = "</tool_call>"


@pytest.mark.parametrize(
    ("form", "text", "found"),
    [
        (ELEMENTS, f"{OPEN}{END * 20_000}\n</parameter>\n</function>\n{END}", "call"),
        (ELEMENTS, f"{OPEN}{END * 20_000}", "call"),
        (ELEMENTS, f"{'<tool_call><function=rain>' * 20_000}{END}", "text"),
        (HERMES, ONE.replace("Bern", f"{END * 20_000}").join(("<tool_call>", END)), "call"),
        (HERMES, f"<tool_call>{ONE}{'<' * 200_000}", "call"),
        (HERMES, f"<tool_call>{' ' * 200_000}", "text"),
        (HERMES, '<tool_call>{"' * 20_000, "text"),
        (HERMES, f"{'<tool_call>{' * 20_000}{END}", "text"),
        (HERMES, f"{'<tool_call>{}</tool_call>' * 2000}", "text"),
    ],
)
@pytest.mark.parametrize("piece", [1 << 20, 100])
def test_what_is_read_again_is_bounded(
    monkeypatch: pytest.MonkeyPatch, form: Any, text: str, found: str, piece: int
) -> None:
    read_characters: list[int] = []

    def counted(values: Any) -> Any:
        def count(text: str, *more: Any) -> Any:
            read_characters.append(len(text))
            return values(text, *more)

        return count

    for name in ("_elements", "_values"):
        monkeypatch.setattr(tool_formats, name, counted(getattr(tool_formats, name)))
    reader = ToolReader(tools_of(form))
    given: list[Any] = [one for at in range(0, len(text), piece) for one in reader.add(text[at : at + piece])]
    given += reader.rest()
    assert sum(read_characters) <= 2 * (READ_AGAIN_CHARACTERS_MAX + 2 * len(text))  # an end is looked at, and read
    calls = joined(given)
    assert len(calls) == (found == "call")
    if found == "text":
        assert "".join(given) == text
    elif '"}' in calls[0].arguments and END in text:
        assert END * 20_000 in calls[0].arguments


NULLABLE = {"type": ["string", "null"]}
COUNTED = {"anyOf": [{"type": "string"}, {"type": "array"}]}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (NULLABLE, "123", "123"),
        (NULLABLE, "null", None),
        (NULLABLE, '"quoted, as a grammar writes it"', "quoted, as a grammar writes it"),
        (COUNTED, "null", "null"),
        (COUNTED, '["a"]', ["a"]),
        ({"oneOf": [{"$ref": "#/$defs/word"}, {"type": "null"}]}, "true", "true"),
        ({"$ref": "#/$defs/loop"}, "123", "123"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"const": 1}, "1", 1),
        ({"type": "integer"}, "1", 1),
        ({"type": ["number", "string"]}, "1", 1),
        ({"type": "integer"}, "one", "one"),
        ({}, "1", 1),
        (True, "1", 1),
        ({"type": 5, "enum": 5, "anyOf": [5], "$ref": 5}, "1", 1),
    ],
)
def test_values_are_of_the_types_of_the_schema(schema: Any, text: str, value: Any) -> None:
    loop = {"anyOf": [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/word"}]}
    whole = {"properties": {"a": schema}, "$defs": {"word": {"type": "string"}, "loop": loop}}
    tools = ToolSet(ELEMENTS, {"say": whole}, required=False, single_call=False)
    (call,) = read(tools, f"<tool_call><function=say><parameter=a>\n{text}\n</parameter></function></tool_call>")
    assert json.loads(call.arguments) == {"a": value}


def test_formats_are_known_by_their_templates() -> None:
    assert format_of("{% if tools %}<tool_call>{% endif %}") is HERMES
    assert format_of("{% if tools %}<tool_call><function=x>{% endif %}") is None
    assert format_of("{% if tools %}<tool_call><function=x><parameter=y>{% endif %}") is ELEMENTS
    assert format_of("{% if tools %}[TOOL_CALLS]{{ name }}[ARGS]{% endif %}") is NAMED
    assert format_of("{% if tools %}[TOOL_CALLS]{{ name }}[CALL_ID]{{ id }}[ARGS]{% endif %}") is None
    assert format_of('{% if tools %}{"name": x, "parameters": y}{% endif %}') is LLAMA
    assert format_of("{{ messages }}") is None


def test_arguments_of_the_history_are_parsed() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "rain", "arguments": '{"place": "Bern"}'}}
    parsed = with_parsed_arguments({"role": "assistant", "content": "", "tool_calls": [call]})
    assert parsed["tool_calls"][0]["function"]["arguments"] == {"place": "Bern"}
    wrongs: list[Any] = [[5], ["x"], {"a": 1}, [{}], [{"function": {"name": "f", "arguments": "{"}}]]
    for wrong in wrongs:
        with pytest.raises(Problem, match="arguments that are JSON of an object"):
            with_parsed_arguments({"role": "assistant", "tool_calls": wrong})
