"""Decodes new tokens: the text that they add to the text of the prompt.

The new tokens are decoded together with the prompt, and the prompt's text is cut off. Decoded alone they would lose the
space at their beginning, and a character may be spread over several tokens.
"""

from __future__ import annotations

import queue
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from flashclient.errors import OptionError

HALF = "\ufffd"  # a decoder's character for bytes that are not, or not yet, a character
HALF_MAX = 3  # up to this many at the end may still become one character
CHANGED_TOKENS_MAX = 32  # tokens at the end of a prompt whose text later tokens may change
TAIL_TOKENS_MAX = 256  # a stream decodes at most so many tokens again for each piece
TAIL_TOKENS_KEPT = 64


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: list[int], tokens: list[int], fill: int | None) -> str:
    """The text that `tokens`, which begin with `prompt`, add to the prompt.

    Args:
        fill: the token that pads a finished row; None if there is none.
    """
    end = len(tokens)
    while fill is not None and end > len(prompt) and tokens[end - 1] == fill:
        end -= 1
    before, after = _decoded(tokenizer, prompt), _decoded(tokenizer, tokens[:end])
    if after.startswith(before):
        return after[len(before) :]
    # The new tokens change the end of the prompt's text: invalid bytes break the character before them.
    for kept in range(len(prompt) - 1, max(-1, len(prompt) - CHANGED_TOKENS_MAX), -1):
        before = _decoded(tokenizer, prompt[:kept])
        text = _decoded(tokenizer, prompt[:kept] + tokens[len(prompt) : end])
        if text.startswith(before):
            return text[len(before) :]
    return _decoded(tokenizer, tokens[len(prompt) : end])


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text: Any = tokenizer.decode(tokens, skip_special_tokens=True)
    return str(text)


class GrowingText:
    """Decodes a growing sequence. Gives out only text that later tokens cannot change."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._begin(prompt[-TAIL_TOKENS_MAX:])

    def _begin(self, prompt: list[int]) -> None:
        self._prompt, self._tokens = prompt, list(prompt)
        self._given = 0  # characters of the new text that were given out

    def add(self, tokens: list[int]) -> str:
        self._tokens += tokens
        text = self._text(self._settled())
        halves = len(text) - len(text.rstrip(HALF))
        piece = self._give(text[: len(text) - min(halves, HALF_MAX)])
        if len(self._tokens) > TAIL_TOKENS_MAX + TAIL_TOKENS_KEPT:
            self._forget()
        return piece

    def rest(self) -> str:
        return self._give(self._text(len(self._tokens)))

    def _text(self, end: int) -> str:
        return continuation(self._tokenizer, self._prompt, self._tokens[:end], None) if end > len(self._prompt) else ""

    def _give(self, text: str) -> str:
        piece, self._given = text[self._given :], max(self._given, len(text))
        return piece

    def _settled(self) -> int:
        """The number of tokens before a run of bytes at the end; the next byte may change the text of the whole run."""
        end = len(self._tokens)
        while end > len(self._prompt):
            token = self._tokens[end - 1]
            text = self._tokenizer.convert_ids_to_tokens(token)
            if token not in self._special and text and not re.fullmatch("<0x[0-9A-F]{2}>", str(text)):
                break
            end -= 1
        return end

    def _forget(self) -> None:
        """Drops all but the last tokens if all text has been given out and the last tokens have a text."""
        kept = self._tokens[-TAIL_TOKENS_KEPT:]
        settled = self._settled() == len(self._tokens) and self._given == len(self._text(len(self._tokens)))
        if settled and _decoded(self._tokenizer, kept).strip(HALF):
            self._begin(kept)


class _StopWhen(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._event.is_set(), dtype=torch.bool)


class TextStream(BaseStreamer):
    """Text pieces of a generation on a thread of its own, which ends when the reader stops reading."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._text: GrowingText | None = None
        self._pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._abandoned = threading.Event()

    def put(self, value: Tensor) -> None:
        """Takes the prompt [1, tokens] first, then new tokens: [1] or, with a draft, [1, tokens]."""
        if value.shape[0] > 1 and (self._text is None or value.dim() == 1):
            raise OptionError(f"stream() gives the text of one sequence, not of {value.shape[0]}: use generate()")
        tokens = value.reshape(-1).tolist()
        if self._text is None:
            self._text = GrowingText(self._tokenizer, tokens)
        elif piece := self._text.add(tokens):
            self._pieces.put(piece)

    def end(self) -> None:
        if self._text is not None and (piece := self._text.rest()):
            self._pieces.put(piece)

    def pieces(self, generate: Callable[..., Any], prompt: Any, arguments: Mapping[str, Any]) -> Iterator[str]:
        """Starts generate(prompt, **arguments) and yields its text piece by piece; raises what it raises."""
        for name in ("streamer", "return_dict_in_generate"):
            if arguments.get(name):
                raise OptionError(f"{name}= is for generate(): stream() gives pieces of text")
        criteria = StoppingCriteriaList([*(arguments.get("stopping_criteria") or []), _StopWhen(self._abandoned)])
        arguments = {**arguments, "streamer": self, "stopping_criteria": criteria}
        # A daemon thread, so that the program can end before the text does.
        worker = threading.Thread(
            target=self._run, args=(generate, prompt, arguments), name="flashclient-generate", daemon=True
        )
        worker.start()
        try:
            while (piece := self._pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self._abandoned.set()
            if not sys.is_finalizing():  # at exit the thread has ended, or never runs again
                worker.join()

    def _run(self, generate: Callable[..., Any], prompt: Any, arguments: dict[str, Any]) -> None:
        try:
            generate(prompt, **arguments)
        except BaseException as error:  # pieces() raises it
            self._pieces.put(error)
        else:
            self._pieces.put(None)
