"""The messages of a conversation, and what an interrupted answer leaves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flashclient.generation.conversation import Conversation, Message

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


def echo(messages: list[Message]) -> Iterator[str]:
    yield from messages[-1]["content"]


def test_answers_become_part_of_it() -> None:
    conversation = Conversation(echo, "be brief")
    assert "".join(conversation.say("ab")) == "ab"
    assert [(one["role"], one["content"]) for one in conversation.messages] == [
        (SYSTEM, "be brief"),
        (USER, "ab"),
        (ASSISTANT, "ab"),
    ]


def test_an_interrupted_answer_counts_as_far_as_it_came() -> None:
    conversation = Conversation(echo)
    pieces = conversation.say("abc")
    assert next(pieces) == "a"
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.messages[-1]["content"] == "a"


def test_a_message_without_an_answer_does_not_count() -> None:
    def fails(messages: list[Message]) -> Iterator[str]:
        raise ValueError("no")
        yield

    conversation = Conversation(fails)
    with pytest.raises(ValueError, match="no"):
        list(conversation.say("ab"))
    assert conversation.messages == []


def test_undo() -> None:
    conversation = Conversation(echo, "be brief")
    assert conversation.undo() is None
    list(conversation.say("a"))
    list(conversation.say("b"))
    assert conversation.undo() == "b"
    assert [one["content"] for one in conversation.messages] == ["be brief", "a", "a"]
