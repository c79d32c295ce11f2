"""A conversation with a model: its messages, and answers that may be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Message = dict[str, str]

# As the text stands on a screen: what a user adds begins a line.
TEXTS = (
    "{% for m in messages %}{% if m['role'] == 'user' and m['content'] and not loop.first %}{{ '\n' }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)


def template_of_texts(tokenizer: Any) -> str:
    """A chat template for base models, which have none: one text, which the model continues."""
    begins = tokenizer("a").input_ids[0] == tokenizer.bos_token_id  # a tokenizer adds it to texts, not to templates
    return "{{ bos_token }}" + TEXTS if begins else TEXTS


class Conversation:
    """Messages of a user and a model, in turn.

    Args:
        answer: the pieces of the model's answer to a list of messages.
        system: a message of the system at the beginning; empty: none.
    """

    def __init__(self, answer: Callable[[list[Message]], Iterator[str]], system: str = "") -> None:
        self._answer = answer
        self.system = system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """All messages, as a chat template takes them."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def say(self, text: str) -> Iterator[str]:
        """Yields the answer to a user's message.

        Both become part of the conversation: after an interruption, the answer as far as it came. If there is no answer
        at all, the message does not count either.
        """
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        said: list[str] = []
        pieces: Any = self._answer(asked)
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        finally:
            pieces.close()
            if said:
                self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(said)}]

    def undo(self) -> str | None:
        """Removes the last message and its answer. Returns the message; None if there is none."""
        if not self.turns:
            return None
        *self.turns, asked, _ = self.turns
        return asked["content"]
