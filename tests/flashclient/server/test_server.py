"""The real server, asked by the official client of the interface: answers, streams, options, refusals, keys."""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from checkpoints import make_checkpoint
from daemon import Daemon, serving
from openai_servers import server_of
from run_here import run_here

from flashclient import FlashClient
from flashclient.cli import main
from weightd import cli

TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% if messages[-1]['content'] == 'Bah' %}{{ raise_exception('no such word') }}{% endif %}"
    "{% if messages[-1]['content'] == 'Loop' %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}a:"
)
KEY = "sk-secret"
JSON = "application/json"
STOP_S = 60.0
SITE = "http://localhost:3000"
NAME = "tiny-chat"
OTHER = "tiny-other"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("server")
    checkpoint = make_checkpoint("llama", folder / NAME, max_position_embeddings=512)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    generation = checkpoint / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": None}))
    other = make_checkpoint("opt", folder / OTHER, max_position_embeddings=512)
    for one in (checkpoint, other):
        assert cli.main(["import", str(one), "--store", str(folder / "store")]) == 0
    with serving(folder / "store", "--dram", "64MiB") as started:
        yield started


@pytest.fixture(scope="module")
def address(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"sk-other\n\n{KEY}\n")
    with server_of(daemon, NAME, OTHER, flags=("--api-key-file", str(keys))) as url:
        yield url


@pytest.fixture(scope="module")
def asking(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def alone(daemon: Daemon) -> Iterator[FlashClient]:
    with FlashClient(NAME, address=daemon.address) as client:
        yield client


def with_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}}


def nested(depth: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(depth - 1)} if depth else {"type": "string"}


def with_parameters(parameters: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "rain", "parameters": parameters}}]


TOOLS = with_parameters(
    {
        "type": "object",
        "properties": {"place": {"enum": ["Bern", "Rome"]}},
        "required": ["place"],
        "additionalProperties": False,
    }
)
HI: Any = [{"role": "user", "content": "Hi"}]
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0}


def test_models(asking: openai.OpenAI) -> None:
    assert [model.id for model in asking.models.list()] == [NAME, OTHER]
    assert asking.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4': this server has tiny-chat, tiny-other"):
        asking.models.retrieve("gpt-4")


def test_a_completion(asking: openai.OpenAI, alone: FlashClient) -> None:
    made = asking.completions.create(prompt="Once upon", max_tokens=6, **GREEDY)
    assert made.choices[0].text == alone.generate("Once upon", max_new_tokens=6, do_sample=False)
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    assert (made.usage.completion_tokens, made.usage.total_tokens) == (6, made.usage.prompt_tokens + 6)
    several = asking.completions.create(prompt=["Once upon", "Twice"], max_tokens=6, **GREEDY)
    assert several.choices[0].text == made.choices[0].text
    assert several.choices[1].index == 1


def test_models_at_once(daemon: Daemon, asking: openai.OpenAI, alone: FlashClient) -> None:
    got: dict[str, list[str]] = {NAME: [], OTHER: []}

    def ask(name: str) -> None:
        for number in range(3):
            made = asking.completions.create(model=name, prompt=f"Tale {number}", max_tokens=12, temperature=0)
            got[name].append(made.choices[0].text)

    with ThreadPoolExecutor() as threads:
        list(threads.map(ask, got))
    with FlashClient(OTHER, address=daemon.address) as other:
        for name, client in ((NAME, alone), (OTHER, other)):
            prompts = [f"Tale {number}" for number in range(3)]
            assert got[name] == [client.generate(prompt, max_new_tokens=12, do_sample=False) for prompt in prompts]


def test_ids_and_defaults(asking: openai.OpenAI) -> None:
    made = asking.completions.create(model=NAME, prompt=[5, 6, 7], seed=1)
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (3, 16)
    with pytest.raises(openai.BadRequestError, match="the prompt has token 100000, and the model's tokens are 0 to"):
        asking.completions.create(model=NAME, prompt=[100_000])


def test_a_chat(asking: openai.OpenAI, alone: FlashClient) -> None:
    made = asking.chat.completions.create(messages=HI, max_tokens=6, **GREEDY)
    assert made.choices[0].message.role == "assistant"
    assert made.choices[0].message.content == alone.chat(HI, max_new_tokens=6, do_sample=False)
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    again = asking.chat.completions.create(messages=parts, max_completion_tokens=6, **GREEDY)
    assert again.choices[0].message.content == made.choices[0].message.content


def test_a_turn_after_another(asking: openai.OpenAI) -> None:
    said: Any = [{"role": "user", "content": "A beginning " * 9}]
    first = asking.chat.completions.create(messages=said, max_tokens=4, **GREEDY)
    said += [{"role": "assistant", "content": first.choices[0].message.content}, *HI]
    second = asking.chat.completions.create(messages=said, max_tokens=4, n=2, **GREEDY)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1
    stranger = asking.with_options(api_key="sk-other")
    third = stranger.chat.completions.create(messages=said, max_tokens=4, **GREEDY)
    assert third.choices[0].message.content == second.choices[0].message.content
    assert third.usage is not None
    assert third.usage.prompt_tokens_details is not None
    assert third.usage.prompt_tokens_details.cached_tokens == 0


def test_an_answer_that_follows_a_schema(asking: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Bern", "Rome"]}, "tall": {"type": "boolean"}},
        "required": ["city", "tall"],
        "additionalProperties": False,
    }
    for seed in range(3):
        more: dict[str, Any] = {"n": 2, "seed": seed, "temperature": 2, "max_tokens": 400, "model": NAME}
        made = asking.chat.completions.create(messages=HI, **with_schema(schema), **more)
        for choice in made.choices:
            said = json.loads(choice.message.content or "")
            assert choice.finish_reason == "stop"
            assert said["city"] in ("Bern", "Rome")
            assert isinstance(said["tall"], bool)
    chunks = asking.chat.completions.create(messages=HI, max_tokens=400, stream=True, **with_schema(schema), **GREEDY)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert set(json.loads(streamed)) == {"city", "tall"}
    cut = asking.chat.completions.create(
        messages=HI, max_tokens=3, response_format={"type": "json_object"}, model=NAME, temperature=0
    )
    assert (cut.choices[0].message.content or "")[0] == "{"
    assert cut.choices[0].finish_reason == "length"


def test_calls_of_tools(asking: openai.OpenAI, alone: FlashClient) -> None:
    more: dict[str, Any] = {"max_tokens": 250, "tools": TOOLS, "temperature": 2, "seed": 1, "model": NAME}
    choices: list[Any] = ["required", {"type": "function", "function": {"name": "rain"}}]
    for choice in choices:
        made: Any = asking.chat.completions.create(messages=HI, tool_choice=choice, parallel_tool_calls=False, **more)
        (call,) = made.choices[0].message.tool_calls
        assert made.choices[0].finish_reason == "tool_calls"
        assert made.choices[0].message.content is None
        assert call.function.name == "rain"
        assert json.loads(call.function.arguments)["place"] in ("Bern", "Rome")
    stream: Any = asking.chat.completions.create(
        messages=HI, tool_choice="required", parallel_tool_calls=False, stream=True, **more
    )
    chunks = list(stream)
    deltas = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or ()]
    assert [(one.index, one.function.name, one.id is None) for one in deltas[:2]] == [
        (0, "rain", False),
        (0, None, True),
    ]
    pieces = [one.function.arguments for one in deltas]
    assert ("".join(pieces), pieces[0], len(pieces) > 3) == (call.function.arguments, "", True)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    history: Any = [*HI, made.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "dry"}]
    after = asking.chat.completions.create(messages=history, max_tokens=4, tools=TOOLS, tool_choice="none", **GREEDY)
    assert after.choices[0].message.tool_calls is None
    auto = asking.chat.completions.create(messages=HI, max_tokens=6, tools=TOOLS, **GREEDY)
    assert auto.choices[0].message.content == alone.chat(HI, tools=TOOLS, max_new_tokens=6, do_sample=False)


def test_streams(asking: openai.OpenAI, alone: FlashClient) -> None:
    expected = alone.chat(HI, max_new_tokens=12, do_sample=False)
    more: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(asking.chat.completions.create(messages=HI, max_tokens=12, **GREEDY, **more))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    texts = asking.completions.create(prompt="Once", max_tokens=12, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in texts) == alone.generate(
        "Once", max_new_tokens=12, do_sample=False
    )


def test_stop_n_and_seed(asking: openai.OpenAI, alone: FlashClient) -> None:
    text = alone.generate("Once", max_new_tokens=12, do_sample=False)
    stop = text[4:6]
    made = asking.completions.create(prompt="Once", max_tokens=12, stop=stop, **GREEDY)
    assert (made.choices[0].text, made.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    sampled = [
        asking.chat.completions.create(model=NAME, messages=HI, n=3, seed=seed, temperature=2, max_tokens=8)
        for seed in (1, 1, 2)
    ]
    texts = [[choice.message.content for choice in one.choices] for one in sampled]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 1
    assert sampled[0].usage is not None
    assert sampled[0].usage.completion_tokens == 24


def test_logprobs(asking: openai.OpenAI) -> None:
    made = asking.chat.completions.create(messages=HI, max_tokens=4, logprobs=True, top_logprobs=3, **GREEDY)
    assert made.choices[0].logprobs is not None
    content = made.choices[0].logprobs.content or []
    assert len(content) == 4
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
    old = asking.completions.create(prompt="Once", max_tokens=4, logprobs=2, **GREEDY)
    assert old.choices[0].logprobs is not None
    assert len(old.choices[0].logprobs.token_logprobs or []) == 4
    chunks = list(asking.chat.completions.create(messages=HI, max_tokens=4, logprobs=True, stream=True, **GREEDY))
    given = [chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs is not None]
    assert sum(len(one or []) for one in given) == 4


def test_requests_at_once_do_not_change_each_other(asking: openai.OpenAI, alone: FlashClient) -> None:
    prompts = [f"Tale {number} of {'many ' * number}" for number in range(10)]
    expected = [alone.generate(prompt, max_new_tokens=20, do_sample=False) for prompt in prompts]
    got: dict[int, str] = {}

    def ask(number: int) -> None:
        made = asking.completions.create(prompt=prompts[number], max_tokens=20, **GREEDY)
        got[number] = made.choices[0].text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[number] for number in range(len(prompts))] == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"messages": []}, "messages: "),
        ({"temperature": -1}, "temperature: input should be greater than or equal to 0"),
        ({"n": 100}, "n: input should be less than or equal to 16"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 5000}, "the model's context is 512 tokens"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs: true"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name: string should match"),
        ({"tools": TOOLS * 2}, "two tools have one name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice names 'g'"),
        ({"tool_choice": "required"}, "tool_choice required needs tools"),
        ({"tools": with_parameters({"type": "no"}), "tool_choice": "required"}, "tools: the grammar is refused: "),
        ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "arguments that are JSON of an object"),
        ({"response_format": {"type": "xml"}}, "response_format: "),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: field required"),
        ({"tool_choice": {"type": "function", "name": "rain"}}, "tool_choice.function: field required"),
        ({"stop": ["a", ""]}, "stop.1: string should have at least 1 character"),
        ({"extra_body": {"functions": []}}, "this server does not know functions: use tools"),
        ({"extra_body": {"reasoning_effort": "low"}}, "the chat template uses no 'reasoning_effort': leave it out"),
        ({"store": True}, "this server stores no answers: leave out store"),
        (with_schema({"type": "nope"}), "response_format: the schema is refused: Invalid type: nope"),
        (with_schema({"enum": [f"v{one}" for one in range(9000)]}), "response_format: the schema has"),
        (with_schema(nested(150)), "response_format: the schema is refused: recursion limit exceeded"),
        (with_schema({"allOf": [{"anyOf": [{"pattern": f".{{{i}}}a"}] * 6} for i in range(8)]}), "schema too large"),
        ({"extra_body": {"best": 1}}, "this server does not know best: leave it out"),
        (
            {"extra_body": {"chat_template_kwargs": {"thinking": True}}},
            "the chat template uses no 'thinking': leave it out",
        ),
        ({"messages": [{"role": "user", "content": "Bah"}]}, "the model's chat template refuses the messages"),
        ({"messages": [{"content": "Hi"}]}, "message 0 has no role"),
        ({"messages": [{"role": "user", "content": "Hi" * 200_000}]}, "and the prompt has 400005 characters"),
        ({"tools": with_parameters({"type": "object", "title": "Hi" * 200_000})}, "the model's context is 512"),
        ({"messages": [{"role": "user", "content": "Loop"}]}, "formatting the conversation takes longer than 3 s"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "this server reads text only"),
        ({"stop": ""}, "stop: "),
        ({"messages": [{"role": "user"}]}, "a message has no text: give its content as a string"),
        ({"messages": [{"role": "user", "content": 5}]}, "a message has no text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "a part of a message has no text",
        ),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "function_call is not supported"),
        ({"messages": [*HI, {"role": "function", "name": "f", "content": "1"}]}, "give results with role 'tool'"),
        ({"max_tokens": True}, "max_tokens is neither true nor false"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}}, "cannot set chat_template"),
        ({"extra_body": {"repetition_penalty": 1e-40}}, "repetition_penalty: "),
        ({"logit_bias": {"100000": 5}}, "logit_bias has token 100000, and the model's tokens are 0 to"),
    ],
)
def test_refusals_name_the_field(asking: openai.OpenAI, more: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        asking.chat.completions.create(**{"messages": HI, "max_tokens": 4, **GREEDY, **more})
    assert message in refused.value.body["message"]  # type: ignore[index]


HABITS: list[dict[str, Any]] = [
    dict.fromkeys(("audio", "functions", "function_call", "stop", "logit_bias", "response_format", "best")),
    {"max_tokens": -1, "max_completion_tokens": 1, "top_k": -1},  # LM Studio, vLLM
    {"logprobs": False, "top_logprobs": 0, "tool_choice": "auto", "tools": []},
    {"prediction": {"type": "content", "content": "x"}, "modalities": ["text"], "prompt_cache_retention": "24h"},
    {"response_format": {"type": "json_object", "schema": {"type": "object"}}},  # llama.cpp
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}},
    {"messages": [*HI, {"role": "assistant", "content": None, "tool_calls": None, "refusal": None}, *HI]},
]


@pytest.mark.parametrize("habit", HABITS)
def test_habits_of_other_clients_are_answered(address: str, habit: dict[str, Any]) -> None:
    asked = {**GREEDY, "messages": HI, "max_tokens": 1} | habit
    status, answer = raw(address, "POST", "/v1/chat/completions/", json.dumps(asked).encode())
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == 1


def test_a_developer_is_the_system(asking: openai.OpenAI) -> None:
    messages: list[Any] = [[{"role": role, "content": "Be"}, *HI] for role in ("developer", "system")]
    made = [asking.chat.completions.create(messages=one, max_tokens=6, **GREEDY) for one in messages]
    assert made[0].choices[0].message == made[1].choices[0].message


def test_tools_that_are_allowed(asking: openai.OpenAI) -> None:
    other = {"type": "function", "function": {"name": "snow", "parameters": {"type": "object"}}}
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "rain"}}]}
    more: Any = {"tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}, "tools": [*TOOLS, other]}
    more |= {"parallel_tool_calls": False, "max_tokens": 200, "temperature": 2, "seed": 1}
    made: Any = asking.chat.completions.create(messages=HI, model=NAME, **more)
    assert [call.function.name for call in made.choices[0].message.tool_calls] == ["rain"]


def test_keys(address: str) -> None:
    for key, message in (("wrong", "the API key is wrong"), ("", "this server wants an API key")):
        with openai.OpenAI(base_url=address, api_key=key or "x", max_retries=0) as client:
            headers = {} if key else {"Authorization": ""}
            with pytest.raises(openai.AuthenticationError, match=message):
                client.chat.completions.create(messages=HI, **GREEDY, extra_headers=headers)
    with openai.OpenAI(base_url=address, api_key="sk-other", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [NAME, OTHER]


def long_text(characters: int) -> bytes:
    return json.dumps({"model": NAME, "prompt": "a" * characters}).encode()


def many(prompts: int, count: int) -> bytes:
    return json.dumps({"model": NAME, "prompt": ["a"] * prompts, "n": count}).encode()


def raw(address: str, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, Any]]:
    host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=STOP_S)
    try:
        connection.request(method, path, body, {"Authorization": f"Bearer {KEY}", "Content-Type": JSON, **headers})
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, (json.loads(text) if text.startswith(b"{") else {}) | dict(answer.headers)
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, "the body is not JSON"),
        ("POST", "/v1/chat/completions", b"[]", 400, "the body"),
        ("POST", "/v1/chat/completions", b"\xff", 400, "the body is not JSON"),
        ("POST", "/v1/embeddings", b"{}", 404, "no POST /v1/embeddings: this server has GET /v1/models"),
        ("GET", "/v1/completions", b"", 405, "no GET /v1/completions"),
        ("POST", "/v1/completions", b'{"model": "tiny-chat", "prompt": "a", "n_predict": 5}', 400, "use max_tokens"),
        ("POST", "/v1/completions", b'{"model": "tiny-chat", "prompt": []}', 400, "the prompt is empty"),
        ("POST", "/v1/completions", b'{"model": "tiny-chat", "prompt": "a", "echo": true}', 400, "echo"),
        ("POST", "/v1/completions", many(65, 1), 400, "prompt: "),
        ("POST", "/v1/completions", json.dumps({str(one): 1 for one in range(2000)}).encode(), 400, "2002 faults"),
        ("POST", "/v1/completions", long_text(300_000), 400, "and the prompt has 300000 characters"),
        ("POST", "/v1/completions", many(20, 16), 400, "a request may ask for 64 sequences, not 320"),
        ("POST", "/v1/completions", b" " * (9 << 20), 413, "the body is larger than 8 MiB"),
    ],
)
def test_raw_errors_have_one_shape(
    address: str, method: str, path: str, body: bytes, status: int, message: str
) -> None:
    got, answer = raw(address, method, path, body)
    assert got == status
    assert message in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert status != 405 or answer["allow"] == "POST"


def test_a_client_that_goes_frees_its_place(daemon: Daemon) -> None:
    with (
        server_of(daemon, NAME, flags=("--sequences", "1", "--waiting", "2", "--allow-origin", SITE)) as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
    ):
        status, answer = raw(url, "GET", "/v1/models", Host="a.example")
        assert (status, answer["error"]["type"]) == (403, "invalid_request_error")
        asks: dict[str, str] = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,x-stainless-os",
        }
        _, allowed = raw(url, "OPTIONS", "/v1/chat/completions", b"", Origin=SITE, **asks)
        assert allowed["access-control-allow-origin"] == SITE
        assert "x-stainless-os" in allowed["access-control-allow-headers"]
        assert "access-control-allow-origin" not in raw(url, "GET", "/v1/models", Origin="http://a.example")[1]
        endless: dict[str, Any] = {"max_tokens": 400, **GREEDY}
        stream = client.completions.create(prompt="Once", stream=True, **endless)
        next(iter(stream))
        waiting = client.completions.create(prompt="Then", stream=True, **endless)
        with pytest.raises(openai.RateLimitError, match="requests wait already") as busy:
            client.completions.create(prompt=["Now", "Here"], stream=True, **endless)
        assert busy.value.response.headers["retry-after"] == "1"
        stream.close()
        next(iter(waiting))
        waiting.close()
        assert client.completions.create(prompt="Once", max_tokens=2, **GREEDY).usage is not None


def test_health_and_metrics(address: str) -> None:
    status, answer = raw(address, "GET", "/health")
    assert (status, answer["status"]) == (200, "ok")
    status, head = raw(address, "HEAD", "/health")
    assert (status, head["content-length"]) == (200, answer["content-length"])
    assert [one["id"] for one in raw(address, "GET", "/v1/models/")[1]["data"]] == [NAME, OTHER]
    host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=STOP_S)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    assert f'flashclient_running{{model="{NAME}"}}' in text
    assert "flashclient_made_tokens_total" in text


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--host", "0.0.0.0"], 2, "--host 0.0.0.0 may be reached by others: pass --api-key-file, too"),
        (["--api-key-file", "/nowhere/keys"], 2, "the file of API keys /nowhere/keys: no such file or directory"),
        (["--api-key-file", os.devnull], 2, "has no key: write one a line"),
        (["--port", "70000"], 2, "'70000' is not a port from 0 to 65535"),
        (["--address", "ADDRESS", NAME, NAME], 2, f"model '{NAME}' is given twice: give each once"),
        (["--allow-origin", "*"], 2, "pass --api-key-file, too"),
        (["--allow-origin", "localhost"], 2, "'localhost' is not a site such as http://localhost:3000"),
        (["--sequences", "17"], 2, "--sequences 17 is more than 16"),
        (["--host", "192.0.2.1", "--api-key-file", "KEYS", "--address", "unix:/no", NAME], 1, "listen at 192.0.2.1"),
    ],
)
def test_bad_flags(daemon: Daemon, tmp_path: Path, flags: list[str], status: int, message: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    flags = [{"KEYS": str(keys), "ADDRESS": daemon.address}.get(flag, flag) for flag in flags]
    flags += [] if "--address" in flags else [NAME, "--address", daemon.address]
    done = run_here(main, "flashclient", "serve", *flags)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("flashclient: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
