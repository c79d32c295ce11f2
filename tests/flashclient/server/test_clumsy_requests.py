"""Requests that clients send by mistake, or out of habit, to the real server: each is answered, or refused by name."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from checkpoints import make_checkpoint
from daemon import serving
from openai_servers import server_of
from pydantic import ValidationError

from flashclient.server.problems import refused
from flashclient.server.schema import SAID_ANYWAY, ChatBody, CompletionBody, SamplingBody
from weightd import cli

TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}a:"
STRICT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}"
)
CHAT, BASE, STRICT = "tiny-chat", "tiny-base", "tiny-strict"
CONTEXT_TOKENS = 64
ANSWER_S = 60.0
HI = [{"role": "user", "content": "Hi"}]
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("clumsy")
    for name, template in ((CHAT, TEMPLATE), (BASE, None), (STRICT, STRICT_TEMPLATE)):
        checkpoint = make_checkpoint("llama", folder / name, max_position_embeddings=CONTEXT_TOKENS)
        if template is not None:
            (checkpoint / "chat_template.jinja").write_text(template)
        assert cli.main(["import", str(checkpoint), "--store", str(folder / "store")]) == 0
    with serving(folder / "store", "--dram", "64MiB") as daemon, server_of(daemon, CHAT, BASE, STRICT) as url:
        yield url.removeprefix("http://").removesuffix("/v1")


def asked(address: str, path: str, more: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    own = {"messages": HI} if path == CHATS else {"prompt": "Once"}
    body = {"model": CHAT, "max_tokens": 2, "temperature": 0, **own, **more}
    connection = http.client.HTTPConnection(address, timeout=ANSWER_S)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


LONG = "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "more", "param", "code", "message"),
    [
        (CHATS, {"model": BASE}, "model", None, "'tiny-base' has no chat template, as base models have none: send"),
        (
            CHATS,
            {"model": STRICT, "messages": [{"role": "wizard", "content": "Hi"}]},
            "messages",
            None,
            "has the role 'wizard': use one",
        ),
        (CHATS, {"messages": [{"role": "", "content": "Hi"}]}, "messages", None, "has the role ''"),
        (CHATS, {"messages": [{"role": "a wizard", "content": "Hi"}]}, "messages", None, "has the role 'a wizard'"),
        (CHATS, {"messages": [{"role": "user", "content": "Hi" * 99}]}, None, LONG, "context is 64 tokens"),
        (CHATS, {"max_tokens": 64}, None, LONG, "new ones fit, not 64"),
        (CHATS, {"logit_bias": {"-1": 5}}, "logit_bias", None, "logit_bias has token -1"),
        (COMPLETIONS, {"prompt": [5] * 64}, None, LONG, "the prompt has 64: shorten the prompt"),
        (COMPLETIONS, {"prompt": [10**30]}, "prompt", None, "the prompt has token 1000"),
        (COMPLETIONS, {"prompt": ["a"] * 64, "n": 2}, "n", None, "64 sequences, not 128"),
    ],
)
def test_refusals_say_where_the_fault_is(
    address: str, path: str, more: dict[str, Any], param: str | None, code: str | None, message: str
) -> None:
    status, answer = asked(address, path, more)
    error = answer["error"]
    assert (status, error["param"], error["code"]) == (400, param, code)
    assert message in error["message"]


FUNCTION = {"name": "rain", "description": None, "parameters": None, "strict": None, "examples": None}


@pytest.mark.parametrize(
    "more",
    [
        {"response_format": {"type": "text", "json_schema": None}},
        {"response_format": {"type": "json_object", "schema": None}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": None, "schema": None, "x": None}}},
        {"stream_options": {"include_usage": None, "other": None}},
        {"tools": [{"type": "function", "function": FUNCTION, "cache_control": None}], "tool_choice": "none"},
    ],
)
def test_nulls_are_as_good_as_left_out_at_every_depth(address: str, more: dict[str, Any]) -> None:
    status, answer = asked(address, CHATS, more)
    assert status == 200, answer


def test_roles_of_the_interface_and_those_that_the_template_writes_are_answered(address: str) -> None:
    for role in ("system", "developer", "user", "assistant", "wizard"):
        status, answer = asked(address, CHATS, {"messages": [{"role": role, "content": "Be", "name": "f"}, *HI]})
        assert status == 200, answer


@pytest.mark.parametrize("path", [CHATS, COMPLETIONS])
def test_what_is_done_anyway_may_be_said(address: str, path: str) -> None:
    for name, values in SAID_ANYWAY.items():
        for value in values:
            status, answer = asked(address, path, {name: value})
            assert status == 200, answer
    status, answer = asked(address, path, {"ignore_eos": True})
    assert (status, answer["error"]["param"]) == (400, "ignore_eos")


def test_the_endpoint_of_a_field_is_named() -> None:
    kind: type[SamplingBody]
    for kind, sent, message in (
        (CompletionBody, {"messages": HI}, "this endpoint takes prompt: send messages to /v1/chat/completions"),
        (ChatBody, {"prompt": "Hi"}, "this endpoint takes messages: send prompt to /v1/completions"),
    ):
        body = json.dumps({"model": CHAT, **sent}).encode()
        with pytest.raises(ValidationError) as raised:
            kind.model_validate_json(body)
        assert refused(raised.value, body).message == message


def test_the_likeliest_alternative_comes_first(address: str) -> None:
    status, answer = asked(address, COMPLETIONS, {"logprobs": 5})
    assert status == 200, answer
    for values in answer["choices"][0]["logprobs"]["top_logprobs"]:
        assert list(values.values()) == sorted(values.values(), reverse=True)
