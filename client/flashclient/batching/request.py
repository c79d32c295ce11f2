"""A text that somebody waits for, while it is made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashclient.batching.constraint import Constraint
from flashclient.batching.sampling import Picked, Sampler, Sampling
from flashclient.generation.stop_texts import StopTexts
from flashclient.generation.texts import GrowingText


@dataclass(frozen=True)
class Progress:
    """What a step added to a text.

    Attributes:
        text: that can be shown from now on.
        picked: the step's token, unless it is the end of the text.
        finished: why the text ended: "stop" or "length"; None while it goes on.
        error: why it could not be finished.
    """

    text: str = ""
    picked: Picked | None = None
    finished: str | None = None
    error: Exception | None = None


@dataclass
class TextRequest:
    """One sequence to make. `tell` is called from the scheduler's thread, and must not block.

    Attributes:
        prompt: token ids, at least one.
        tokens_max: new tokens at most.
        ends: tokens that end the text.
        stops: texts that end it, and are not part of it.
        constraint: what it must be; it ends where nothing may follow.
        markers: special tokens that are shown, with their texts; others are not.
        owner: what is kept of this request is for requests of the same owner.
    """

    prompt: Sequence[int]
    tokenizer: Any
    sampling: Sampling
    tokens_max: int
    ends: frozenset[int]
    stops: Sequence[str]
    tell: Callable[[Progress], None]
    constraint: Constraint | None = None
    markers: Mapping[int, str] = field(default_factory=dict)
    owner: int = 0
    made: int = 0
    kept_tokens: int = 0  # of the prompt, which were not computed again
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._sampler = Sampler(self.sampling, self.prompt, self.constraint)
        self._text = GrowingText(self.tokenizer, list(self.prompt))
        self._stops = StopTexts(self.stops)

    @property
    def tokens(self) -> Sequence[int]:
        """The prompt, and what was made so far."""
        return self._sampler.tokens

    def cancel(self) -> None:
        """Nobody waits any more: nothing more is computed. May be called from any thread."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def take(self, logits: Any) -> int | None:
        """Picks the next token from logits [vocabulary], and tells what it adds. None where the text has ended."""
        picked = self._sampler.pick(logits)
        self.made += 1
        ended = picked.token in self.ends
        text = "" if ended else self._stops.add(self._added(picked.token))
        complete = self.constraint is not None and self.constraint.complete
        finished = "stop" if ended or complete or self._stops.found is not None else None
        if finished is None and self.made == self.tokens_max:
            finished = "length"
        if finished is not None and self._stops.found is None:
            text += self._stops.add(self._text.rest())
            finished = "stop" if self._stops.found is not None else finished
            text += self._stops.rest()
        self.tell(Progress(text, None if ended else picked, finished))
        return picked.token if finished is None else None

    def _added(self, token: int) -> str:
        if token not in self.markers:
            return self._text.add([token])
        before = self._text.rest()
        return before + self._text.add([token]) + self.markers[token]

    def fail(self, error: Exception) -> None:
        """Tells that the text cannot be finished."""
        self.tell(Progress(error=error))
