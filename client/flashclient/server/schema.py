"""The bodies of requests, as the OpenAI interface defines them. A field that is not known here is refused by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flashclient.batching.sampling import TOP_LOGPROBS_MAX, Sampling
from flashclient.server.answer_formats import AnswerFormat
from flashclient.server.problems import Problem
from flashclient.server.tools import with_parsed_arguments

N_MAX = 16
STOPS_MAX = 16
BIASES_MAX = 1024
PROMPTS_MAX = 64
TOOLS_MAX = 128
PROMPT_TOKENS_MAX = 1 << 20
COMPLETION_TOKENS_DEFAULT = 16  # of the interface

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Ids = Annotated[list[int], Field(max_length=PROMPT_TOKENS_MAX, fail_fast=True)]
Stop = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=STOPS_MAX)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False


SAMPLING_FIELDS = tuple(field.name for field in fields(Sampling) if field.name != "top_logprobs")


class SamplingBody(_Body):
    """What both endpoints take: how tokens are chosen. top_k, min_p and repetition_penalty are additions."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=BIASES_MAX)] | None = (
        None
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str, Field(min_length=1)] | Stop | None = None
    n: Annotated[int, Field(ge=1, le=N_MAX)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # They change no answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def reports_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def chosen(self) -> dict[str, Any]:
        """The fields of Sampling that the request sets."""
        return {name: getattr(self, name) for name in SAMPLING_FIELDS if getattr(self, name) is not None}


class CompletionBody(SamplingBody):
    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(max_length=PROMPTS_MAX)]
    max_tokens: Annotated[int, Field(ge=1)] | None = COMPLETION_TOKENS_DEFAULT
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    echo: Literal[False] | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more texts, or lists of ids. Raises Problem for none."""
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        prompts = prompt if several else [prompt]
        if not all(prompts):
            raise Problem(400, "the prompt is empty: give a text or token ids", "prompt")
        if self.best_of not in (None, 1, self.n):
            raise Problem(400, "best_of is not supported: leave it out, or give the value of n", "best_of")
        return list(prompts)


class ToolFunction(_Body):
    """`strict` changes nothing: arguments follow their schema where a call is required."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    type: Literal["function"]
    function: ToolFunction


class _Named(_Body):
    name: str


class NamedTool(_Body):
    type: Literal["function"]
    function: _Named


class ChatBody(SamplingBody):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: AnswerFormat | None = None
    store: Literal[False] | None = None
    tools: Annotated[list[Tool], Field(max_length=TOOLS_MAX)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def tokens_max(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """The likeliest tokens to report beside each; None where no logarithms are wanted. Raises Problem."""
        if self.top_logprobs is not None and not self.logprobs:
            raise Problem(400, "top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> list[dict[str, Any]]:
        """The messages, as chat templates take them. Raises Problem for what this server does not do."""
        return [with_parsed_arguments(message | {"content": _text(message)}) for message in self.messages]

    @property
    def functions(self) -> dict[str, ToolFunction]:
        """Those that may be called, by name. Raises Problem if there are not those that the choice needs."""
        given = {tool.function.name: tool.function for tool in self.tools or ()}
        if len(given) < len(self.tools or ()):
            raise Problem(400, "two tools have one name: give each its own", "tools")
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if name not in given:
                raise Problem(400, f"tool_choice names '{name}', and there is no such tool", "tool_choice")
            return {name: given[name]}
        if self.tool_choice in ("required", "auto") and not given:
            raise Problem(400, f"tool_choice {self.tool_choice} needs tools", "tool_choice")
        return {} if self.tool_choice == "none" else given

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Problem(400, "a message has no text: give its content as a string", "messages")
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise Problem(400, "a message has a part that is not text, and this server reads text only", "messages")
    return "".join(str(part.get("text", "")) for part in content)
