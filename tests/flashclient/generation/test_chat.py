"""Conversations: the chat template's text is continued, and what the template refuses gives a clear error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from checkpoints import make_config, make_model, make_tokenizer
from cut_model import clients_of, cut

from flashclient import FlashClient
from flashclient.errors import OptionError

TEMPLATE = (
    "{% if tools %}T{{ tools | length }}{% endif %}{% if documents %}D{{ documents | length }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}{% if enable_thinking %}?{% endif %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
NEW: dict[str, Any] = {"max_new_tokens": 5}
HI = {"role": "user", "content": "Hi"}
TURNS = [{"role": "system", "content": "be brief"}, HI, {"role": "assistant", "content": "Yo"}, HI]


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FlashClient]]:
    model = make_model(make_config("llama", 1), seed=5)
    model.generation_config.eos_token_id = None
    templates: dict[str, Any] = {"one": TEMPLATE, "none": None, "several": {"short": TEMPLATE, "rag": "R" + TEMPLATE}}
    cuts = [cut(model, make_tokenizer(), name) for name in templates]
    with clients_of(cuts, tmp_path_factory.mktemp("chat")) as made:
        for name, template in templates.items():
            made[name].tokenizer.chat_template = template
        yield made


def tool(city: str) -> None:
    """Looks out of the window.

    Args:
        city: where.
    """


@pytest.mark.parametrize(
    ("messages", "arguments", "laid_out"),
    [
        ("Hi", {}, "u:Hi;a:"),
        (HI, {}, "u:Hi;a:"),
        ([HI], {}, "u:Hi;a:"),
        (TURNS, {}, "s:be brief;u:Hi;a:Yo;u:Hi;a:"),
        ("Hi", {"tools": [tool]}, "T1u:Hi;a:"),
        ("Hi", {"documents": [{"title": "a", "text": "b"}]}, "D1u:Hi;a:"),
        ("Hi", {"enable_thinking": True}, "u:Hi;?a:"),
        ("Hi", {"add_generation_prompt": False}, "u:Hi;"),
        (TURNS[:3], {"continue_final_message": True}, "s:be brief;u:Hi;a:Yo"),
        ("Hi", {"chat_template": "<{{ messages[0]['content'] }}>"}, "<Hi>"),
    ],
)
def test_what_is_laid_out_is_continued(
    clients: dict[str, FlashClient], messages: Any, arguments: dict[str, Any], laid_out: str
) -> None:
    client = clients["one"]
    assert client.chat(messages, **NEW, **arguments) == client.generate(laid_out, **NEW)


def test_several_conversations_and_several_answers(clients: dict[str, FlashClient]) -> None:
    client = clients["one"]
    expected = client.generate(["u:Hi;a:", "s:be brief;u:Hi;a:Yo;u:Hi;a:"], **NEW)
    assert client.chat([[HI], TURNS], **NEW) == expected
    assert client.chat(["Hi", "Hi"], **NEW) == [expected[0]] * 2
    assert len(client.chat("Hi", **NEW, num_beams=3, num_return_sequences=2)) == 2
    assert client.chat("Hi", **NEW, return_dict_in_generate=True).sequences.shape == (1, 12)


def test_named_templates(clients: dict[str, FlashClient]) -> None:
    client = clients["several"]
    assert client.chat("Hi", **NEW, chat_template="rag") == client.generate("Ru:Hi;a:", **NEW)
    with pytest.raises(OptionError, match="several chat templates: pass one of rag, short as chat_template="):
        client.chat("Hi")


@pytest.mark.parametrize(
    ("name", "messages", "arguments", "message"),
    [
        ("none", "Hi", {}, "this model has no chat template: use generate"),
        ("one", [], {}, "cannot chat about an empty list"),
        ("one", 3, {}, "cannot chat about a int"),
        ("one", [{"content": "Hi"}], {}, "message 0 has no role"),
        ("one", [HI, {"role": "user", "text": "Hi"}], {}, "message 1 has a role and only 'text', which the template"),
        ("one", [[HI], [{"role": "user"}]], {}, "message 0 has a role and nothing else: pass its text as 'content'"),
        ("one", [HI, "Hi"], {}, "cannot mix"),
        (
            "one",
            [{"role": "critic", "content": "bad"}],
            {},
            "template refuses the messages: no critics",
        ),
        ("one", "Hi", {"enable_thinkin": True}, "has no argument 'enable_thinkin'"),
        ("one", "Hi", {"chat_template": "{% if"}, "the model's chat template refuses the messages"),
        ("one", "Hi", {"continue_final_message": True, "add_generation_prompt": True}, "refuses the messages"),
        ("one", "Hi", {"chat_template": ""}, "gives no tokens for these messages"),
    ],
)
def test_what_is_no_conversation_is_refused(
    clients: dict[str, FlashClient], name: str, messages: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        clients[name].chat(messages, **arguments)


def test_named_template_of_a_model_without_any(clients: dict[str, FlashClient]) -> None:
    client = clients["none"]
    assert client.chat("Hi", **NEW, chat_template=TEMPLATE) == client.generate("u:Hi;a:", **NEW)
