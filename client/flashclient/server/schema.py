"""The bodies of requests, as the OpenAI interface defines them. A field that is not known here is refused by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from flashclient.batching.sampling import TOP_LOGPROBS_MAX, Sampling
from flashclient.server.answer_formats import AnswerFormat, RequestPart
from flashclient.server.problems import Problem
from flashclient.server.tools import with_parsed_arguments

N_MAX = 16
STOPS_MAX = 16
BIASES_MAX = 1024
PROMPTS_MAX = 64
TOOLS_MAX = 128
PROMPT_TOKENS_MAX = 1 << 20
COMPLETION_TOKENS_DEFAULT = 16  # of the interface

# What clients of other servers send unasked, where it says what this server does anyway.
SAID_ANYWAY: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "best_of": (1,),
    "cache_prompt": (True, False),  # what is kept changes no answer
    "continue_final_message": (False,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "early_stopping": (False,),
    "echo": (False,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "return_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),  # these are skipped
    "stop_token_ids": ([],),
    "tfs_z": (1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Ids = Annotated[list[Annotated[int, Field(strict=True)]], Field(max_length=PROMPT_TOKENS_MAX, fail_fast=True)]
# Other servers take -1 where there is no limit.
TokensMax = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(lambda given: None if given == -1 else given)]
TopK = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(lambda given: 0 if given == -1 else given)]
Stop = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=STOPS_MAX)]


class StreamOptions(RequestPart):
    include_usage: bool = False
    include_obfuscation: bool = False


SAMPLING_FIELDS = tuple(field.name for field in fields(Sampling) if field.name != "top_logprobs")


class SamplingBody(RequestPart):
    """What both endpoints take: how tokens are chosen. top_k, min_p and repetition_penalty are additions."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    top_k: TopK = None
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
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, given: Any) -> Any:
        """Leaves out fields that say nothing. Null is kept for those that are known.

        It is another thing than the default where a number is a limit.

        Raises:
            Problem: true or false stands where a number is wanted.
        """
        if not isinstance(given, dict):
            return given
        for name, field in cls.model_fields.items():
            if isinstance(given.get(name), bool) and bool not in get_args(field.annotation):
                raise Problem(400, f"{name} is neither true nor false: see the interface for what it may be", name)
        known = cls.model_fields
        return {name: value for name, value in given.items() if name in known or not _says_nothing(name, value)}

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


def _says_nothing(name: str, value: Any) -> bool:
    return value is None or value in SAID_ANYWAY.get(name, ())


class CompletionBody(SamplingBody):
    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(max_length=PROMPTS_MAX)]
    max_tokens: TokensMax = COMPLETION_TOKENS_DEFAULT
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more texts, or lists of ids. Raises Problem for none."""
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        prompts = prompt if several else [prompt]
        if not all(prompts):
            raise Problem(400, "the prompt is empty: give a text or token ids", "prompt")
        for name in ("echo", "suffix"):
            if getattr(self, name):
                raise Problem(400, f"{name} is not supported: leave it out", name)
        if self.best_of not in (None, 1, self.n):
            raise Problem(400, "best_of is not supported: leave it out, or give the value of n", "best_of")
        return list(prompts)


class ToolFunction(RequestPart):
    """`strict` changes nothing: arguments follow their schema where a call is required."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(RequestPart):
    type: Literal["function"]
    function: ToolFunction


class _Named(RequestPart):
    name: str


class NamedTool(RequestPart):
    type: Literal["function"]
    function: _Named


class _Allowed(RequestPart):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=TOOLS_MAX)]


class AllowedTools(RequestPart):
    type: Literal["allowed_tools"]
    allowed_tools: _Allowed


class ChatBody(SamplingBody):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: TokensMax = None
    max_completion_tokens: TokensMax = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: AnswerFormat | None = None
    reasoning_effort: str | None = None
    store: bool | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: dict[str, Any] | None = None  # changes no answer
    tools: Annotated[list[Tool], Field(max_length=TOOLS_MAX)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None

    @property
    def tokens_max(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """The likeliest tokens to report beside each; None where no logarithms are wanted. Raises Problem."""
        if self.top_logprobs and not self.logprobs:
            raise Problem(400, "top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> list[dict[str, Any]]:
        """The messages, as chat templates take them. Raises Problem for what this server does not do."""
        if self.store:
            raise Problem(400, "this server stores no answers: leave out store", "store")
        return [with_parsed_arguments(message | {"content": _text(message)}) for message in self.messages]

    @property
    def layout(self) -> dict[str, Any]:
        """Arguments of the chat template."""
        more = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return more | (self.chat_template_kwargs or {})

    @property
    def functions(self) -> dict[str, ToolFunction]:
        """Those that may be called, by name. Raises Problem if there are not those that the choice needs."""
        given = {tool.function.name: tool.function for tool in self.tools or ()}
        if len(given) < len(self.tools or ()):
            raise Problem(400, "two tools have one name: give each its own", "tools")
        if isinstance(self.tool_choice, NamedTool | AllowedTools):
            for name in self._chosen:
                if name not in given:
                    raise Problem(400, f"tool_choice names '{name}', and there is no such tool", "tool_choice")
            return {name: given[name] for name in self._chosen}
        if self.tool_choice == "required" and not given:
            raise Problem(400, "tool_choice required needs tools", "tool_choice")
        return {} if self.tool_choice == "none" else given

    @property
    def _chosen(self) -> list[str]:
        """The names of a choice that has some."""
        choice = self.tool_choice
        if isinstance(choice, AllowedTools):
            return [tool.function.name for tool in choice.allowed_tools.tools]
        return [choice.function.name] if isinstance(choice, NamedTool) else []

    @property
    def must_call(self) -> bool:
        choice = self.tool_choice
        mode = choice.allowed_tools.mode if isinstance(choice, AllowedTools) else choice
        return mode == "required" or isinstance(mode, NamedTool)


def _text(message: dict[str, Any]) -> str:
    if message.get("function_call") is not None:
        raise Problem(400, "function_call is not supported: give tool_calls", "messages")
    content = message.get("content")
    if content is None and (message.get("tool_calls") or message.get("role") == "assistant"):
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Problem(400, "a message has no text: give its content as a string", "messages")
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise Problem(400, "a message has a part that is not text, and this server reads text only", "messages")
    if not all(isinstance(part.get("text"), str) for part in content):
        raise Problem(400, "a part of a message has no text: give it as a string", "messages")
    return "".join(part["text"] for part in content)
