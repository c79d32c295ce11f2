"""Answers and chunks of streams, in the form of the OpenAI interface."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate
from typing import Any

from flashclient.batching.request import Progress
from flashclient.batching.sampling import Picked
from flashclient.generation.texts import HALF
from flashclient.server.hosted_model import Answer
from flashclient.server.problems import Problem
from flashclient.server.tools import ToolCall, ToolReader, ToolSet, joined

DONE = "data: [DONE]\n\n"


class AnswerForm(ABC):
    """One endpoint's form of answers.

    Args:
        with_logprobs: whether logarithms of probabilities are reported.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, model: str, tokenizer: Any, with_logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answer, when all its sequences have finished."""
        choices = []
        for answer in answers:
            text, picked, finished = "", [], None
            async for step in answer.steps():
                text += step.text
                picked += [step.picked] if step.picked is not None else []
                finished = step.finished
            choices.append({"index": answer.index, "finish_reason": finished, **self._choice(text, picked)})
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage_of(answers)}

    async def stream(
        self, answers: Sequence[Answer], merged: AsyncIterator[tuple[Answer, Progress]], usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events: chunks as they come, and at the end [DONE]. An error ends the stream as an event."""
        more = {"usage": None} if usage else {}
        try:
            for answer in answers:
                for delta in self._first():
                    yield self._event(answer.index, delta, None, more)
            async for answer, step in merged:
                for delta in self._deltas(answer.index, step):
                    yield self._event(answer.index, delta, None, more)
                if step.finished is not None:
                    yield self._event(answer.index, self._last(), self._reason(answer.index, step.finished), more)
            if usage:
                yield _data({**self._head, "object": self.chunk_kind, "choices": [], "usage": usage_of(answers)})
        except Exception as error:
            yield _data(Problem.of(error).as_dict())
        yield DONE

    def _event(self, index: int, delta: dict[str, Any], finished: str | None, more: dict[str, Any]) -> str:
        choice = {"index": index, **delta, "finish_reason": finished}
        return _data({**self._head, "object": self.chunk_kind, "choices": [choice], **more})

    def _token_text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def _deltas(self, index: int, step: Progress) -> list[dict[str, Any]]:
        """What a step adds to a sequence."""
        picked = [step.picked] if step.picked is not None else []
        return [self._delta(step.text, picked)] if step.text or (picked and self._with_logprobs) else []

    def _reason(self, index: int, finished: str) -> str:
        """Why a sequence ended."""
        return finished

    @abstractmethod
    def _choice(self, text: str, picked: list[Picked]) -> dict[str, Any]:
        """A whole choice. It may have another finish_reason than the sequence."""

    @abstractmethod
    def _delta(self, text: str, picked: list[Picked]) -> dict[str, Any]:
        """Text that a step adds."""

    def _first(self) -> list[dict[str, Any]]:
        return []

    @abstractmethod
    def _last(self) -> dict[str, Any]:
        """The empty content of a choice's last chunk."""


class CompletionForm(AnswerForm):
    """/v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _choice(self, text: str, picked: list[Picked]) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logprobs(picked)}

    def _delta(self, text: str, picked: list[Picked]) -> dict[str, Any]:
        return self._choice(text, picked)

    def _last(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def _logprobs(self, picked: list[Picked]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        texts = [self._token_text(one.token) for one in picked]
        top = [self._by_text(one) for one in picked]
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in picked],
            "top_logprobs": top,
            "text_offset": list(accumulate(map(len, texts), initial=0))[:-1],
        }

    def _by_text(self, picked: Picked) -> dict[str, float]:
        """The likeliest first. Of tokens with the same text, the likeliest counts."""
        values: dict[str, float] = {}
        for token, value in picked.top:
            values.setdefault(self._token_text(token), value)
        return values


class ChatForm(AnswerForm):
    """/v1/chat/completions.

    Args:
        tools: the functions that the model may call.
    """

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: Any, with_logprobs: bool, tools: ToolSet | None = None) -> None:
        super().__init__(model, tokenizer, with_logprobs)
        self._tools = tools
        self._readers: dict[int, ToolReader] = {}  # of streams, by index

    def _choice(self, text: str, picked: list[Picked]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        choice: dict[str, Any] = {"message": message, "logprobs": self._logprobs(picked)}
        if self._tools is not None:
            reader = ToolReader(self._tools)
            read = reader.add(text) + reader.rest()
            calls = [one.described() for one in joined(read)]
            if calls:
                content = "".join(one for one in read if isinstance(one, str))
                message |= {"content": content or None, "tool_calls": calls}
                choice |= {} if reader.is_cut else {"finish_reason": "tool_calls"}
        return choice

    def _deltas(self, index: int, step: Progress) -> list[dict[str, Any]]:
        if self._tools is None:
            return super()._deltas(index, step)
        reader = self._readers.setdefault(index, ToolReader(self._tools))
        number = reader.calls
        read = reader.add(step.text) + (reader.rest() if step.finished is not None else [])
        deltas = []
        for one in read:
            if isinstance(one, str):
                deltas += [self._delta(one, [])] if one else []
                continue
            if isinstance(one, ToolCall):
                deltas.append(_call_delta({"index": number, **ToolCall(one.name, "").described()}))
                number += 1
            arguments = one.arguments if isinstance(one, ToolCall) else one.text
            if arguments:
                deltas.append(_call_delta({"index": number - 1, "function": {"arguments": arguments}}))
        if step.picked is not None and self._with_logprobs:
            deltas.append(self._delta("", [step.picked]))
        return deltas

    def _reason(self, index: int, finished: str) -> str:
        reader = self._readers.get(index)
        return "tool_calls" if reader is not None and reader.calls and not reader.is_cut else finished

    def _first(self) -> list[dict[str, Any]]:
        return [{"delta": {"role": "assistant", "content": ""}, "logprobs": None}]

    def _delta(self, text: str, picked: list[Picked]) -> dict[str, Any]:
        return {"delta": {"content": text}, "logprobs": self._logprobs(picked)}

    def _last(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def _logprobs(self, picked: list[Picked]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {"content": [self._token(one) for one in picked], "refusal": None}

    def _token(self, picked: Picked) -> dict[str, Any]:
        top = [self._entry(token, value) for token, value in picked.top]
        return {**self._entry(picked.token, picked.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._token_text(token)
        return {"token": text, "logprob": logprob, "bytes": None if HALF in text else list(text.encode())}


def _call_delta(call: dict[str, Any]) -> dict[str, Any]:
    return {"delta": {"tool_calls": [call]}, "logprobs": None}


def usage_of(answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens of all prompts, each counted once, and of all answers."""
    prompts = {id(answer.request.prompt): answer for answer in reversed(answers)}.values()
    prompt_tokens, made = sum(one.prompt_tokens for one in prompts), sum(answer.request.made for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
        "prompt_tokens_details": {"cached_tokens": sum(one.request.kept_tokens for one in prompts)},
    }


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
