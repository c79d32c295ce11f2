"""A model that the server answers with."""

from __future__ import annotations

import asyncio
import copy
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from flashclient.batching.constraint import Constraint, Grammars
from flashclient.batching.request import Progress, TextRequest
from flashclient.batching.sampling import Sampling
from flashclient.batching.scheduler import Scheduler
from flashclient.client import FlashClient
from flashclient.generation.chat import LAYOUT, conversation
from flashclient.generation.prompts import encode
from flashclient.server.deadline import deadline
from flashclient.server.problems import Problem
from flashclient.server.tool_formats import ToolFormat, format_of

SEQUENCES_OF_REQUEST_MAX = 64
CHARACTERS_MIN = 1 << 18  # of a prompt that is encoded in any case: an unknown word of any length may be one token
ROLES = ("system", "user", "assistant", "tool")
STRANGE_ROLE = "flashclient-trial"
TEMPLATE_S = 3.0  # for a chat template, which may have loops in loops
NEW_TOKENS_DEFAULT = 2048  # of a chat, where neither the request nor the model's context sets a limit


@dataclass(frozen=True)
class Asked:
    """What a request wants of each of its prompts, and who asks: the number of a key."""

    sampling: dict[str, Any]
    tokens_max: int | None
    stops: Sequence[str]
    count: int
    top_logprobs: int | None
    constraint: Constraint | None = None
    markers: Mapping[int, str] = field(default_factory=dict)
    owner: int = 0


@dataclass
class Answer:
    """One sequence of a request, and its progress."""

    index: int
    prompt_tokens: int
    request: TextRequest
    progress: asyncio.Queue[Progress]

    async def steps(self) -> AsyncIterator[Progress]:
        """Until it has finished. Raises the error that ended it."""
        while True:
            step = await self.progress.get()
            if step.error is not None:
                raise step.error
            yield step
            if step.finished is not None:
                return


@dataclass
class HostedModel:
    """A client, and the scheduler of its requests.

    Attributes:
        parent: the name of the model that this one is with an adapter.
    """

    name: str
    client: FlashClient
    scheduler: Scheduler
    parent: str | None = None
    created_unix_s: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        model: Any = self.client.model
        self._config = config = model.generation_config
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        ends = getattr(config, "eos_token_id", None)
        self.tokenizer: Any = copy.deepcopy(self.client.tokenizer)  # encodes while the model's own decodes
        self._encoding = threading.Lock()
        longest = max(map(len, self.tokenizer.get_vocab()))
        context = self.client.loaded.context_tokens
        self._characters_max = None if context is None else max(CHARACTERS_MIN, context * longest)
        self._ends = frozenset() if ends is None else frozenset(int(end) for end in np.atleast_1d(ends))
        self._grammars: Grammars | None = None  # made on first use: a large vocabulary takes a second

    def tool_format(self, tools: list[dict[str, Any]] | None) -> ToolFormat:
        """How the model writes calls. Raises Problem if its chat template takes no tools, or none that are known."""
        template = None
        with suppress(ValueError):
            template = self.tokenizer.get_chat_template(None, tools)
        form = None if template is None else format_of(template)
        if form is None:
            why = f"the chat template of '{self.name}' takes no tools, or its calls have a form that is not known here"
            raise Problem(400, f"{why}: leave out tools, tool_calls and messages of tools", "tools")
        return form

    def chat_ids(
        self, messages: list[dict[str, Any]], layout: dict[str, Any], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """The token ids of a conversation. Raises OptionError, Problem if the chat template refuses it."""
        if self.tokenizer.chat_template is None:
            text = f"model '{self.name}' has no chat template, as base models have none: send texts to /v1/completions"
            raise Problem(400, text, "model")
        messages = [self._with_known_role(message) for message in messages]
        if tools or any(message.get("tool_calls") or message.get("role") == "tool" for message in messages):
            self.tool_format(tools)
        refused = [name for name in layout if name in LAYOUT]
        if refused:
            raise Problem(400, f"chat_template_kwargs cannot set {refused[0]}: leave it out", "chat_template_kwargs")
        with self._encoding, deadline(TEMPLATE_S, "formatting the conversation"):
            layout = layout | ({"tools": tools} if tools else {})
            prompt, rest = conversation(
                self.tokenizer, messages, layout, set(), lambda text: self._check_length(len(text))
            )
        if rest:
            name = next(iter(rest))
            param = name if name == "reasoning_effort" else "chat_template_kwargs"
            raise Problem(400, f"the chat template uses no {name!r}: leave it out", param)
        return [int(token) for token in prompt.inputs["input_ids"][0]]

    def _with_known_role(self, message: dict[str, Any]) -> dict[str, Any]:
        """`developer` is the new name of `system`, which only newer chat templates know.

        Raises:
            Problem: the role is none of the interface, and the template neither names it nor writes any role that it is
                given. It might leave such a message out, or take it for another's.
        """
        role, named = message.get("role"), str(self.tokenizer.chat_template)
        if role == "function":  # of an older interface; templates that know only the newer one leave it out in silence
            raise Problem(400, "role 'function' is not supported: give results with role 'tool'", "messages")
        if not isinstance(role, str) or role in ROLES or (role and role in named):
            return message
        if role == "developer":
            return message | {"role": "system"}
        if re.fullmatch(r"[\w.-]{1,64}", role) and self._writes_any_role:
            return message
        raise Problem(400, f"a message has the role {role!r}: use one of {', '.join(ROLES)}", "messages")

    @cached_property
    def _writes_any_role(self) -> bool:
        """As templates do that are like ChatML, so that their authors may train models on roles of their own."""
        messages = [{"role": role, "content": "Hi"} for role in ("user", STRANGE_ROLE)]
        with suppress(Exception), self._encoding, deadline(TEMPLATE_S, "trying a role"):
            return STRANGE_ROLE in str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        return False

    @property
    def grammars(self) -> Grammars:
        """Raises OptionError where the tokenizer does not allow any."""
        with self._encoding:
            if self._grammars is None:
                self._grammars = Grammars(self.tokenizer, self._vocabulary, sorted(self._ends))
            return self._grammars

    def text_ids(self, prompts: list[str] | list[list[int]]) -> list[list[int]]:
        """The token ids of prompts. Raises Problem for ids that are not the model's."""
        with self._encoding:
            return [self._ids(prompt) for prompt in prompts]

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            self._check_length(len(prompt))
            return [int(token) for token in encode(prompt, {}, self.tokenizer).inputs["input_ids"][0]]
        strange = [token for token in prompt if not 0 <= token < self._vocabulary]
        if strange:
            last = self._vocabulary - 1
            raise Problem(400, f"the prompt has token {strange[0]}, and the model's tokens are 0 to {last}", "prompt")
        return prompt

    def _check_length(self, characters: int) -> None:
        """Raises Problem for text that cannot fit the model's context: encoding it would take long."""
        if self._characters_max is not None and characters > self._characters_max:
            context = self.client.loaded.context_tokens
            raise _beyond_context(
                f"the model's context is {context} tokens, and the prompt has {characters} characters"
            )

    def ask(self, prompts: Sequence[Sequence[int]], asked: Asked) -> list[Answer]:
        """Queues the sequences of a request. Raises BusyError, OptionError, Problem; then none is queued."""
        sequences = len(prompts) * asked.count
        if sequences > SEQUENCES_OF_REQUEST_MAX:
            raise Problem(400, f"a request may ask for {SEQUENCES_OF_REQUEST_MAX} sequences, not {sequences}", "n")
        strange = [token for token in asked.sampling.get("logit_bias", ()) if not 0 <= token < self._vocabulary]
        if strange:
            last = self._vocabulary - 1
            text = f"logit_bias has token {strange[0]}, and the model's tokens are 0 to {last}"
            raise Problem(400, text, "logit_bias")
        answers = []
        for place, prompt in enumerate(prompts):
            tokens_max = self._tokens_max(len(prompt), asked.tokens_max)
            for number in range(asked.count):
                index = place * asked.count + number
                answers.append(self._answer(index, prompt, asked, tokens_max, number))
        self.scheduler.submit(*(answer.request for answer in answers))
        return answers

    def _answer(self, index: int, prompt: Sequence[int], asked: Asked, tokens_max: int, number: int) -> Answer:
        progress: asyncio.Queue[Progress] = asyncio.Queue()
        given = asked.sampling
        if given.get("seed") is not None:
            given = given | {"seed": int(given["seed"]) + number}  # alternatives differ
        request = TextRequest(
            prompt,
            self.client.tokenizer,
            Sampling.of(self._config, **given, top_logprobs=asked.top_logprobs),
            tokens_max,
            self._ends,
            asked.stops,
            _teller(asyncio.get_running_loop(), progress),
            None if asked.constraint is None else asked.constraint.copy(),
            asked.markers,
            asked.owner,
        )
        return Answer(index, len(prompt), request, progress)

    def _tokens_max(self, prompt_tokens: int, asked: int | None) -> int:
        """Raises Problem if the prompt and what is asked for are longer than the model's context."""
        context = self.client.loaded.context_tokens
        if context is None:
            return NEW_TOKENS_DEFAULT if asked is None else asked
        room = context - prompt_tokens
        if room < 1 or (asked is not None and asked > room):
            raise _beyond_context(
                f"the model's context is {context} tokens, and the prompt has {prompt_tokens}: "
                + ("shorten the prompt" if room < 1 else f"at most {room} new ones fit, not {asked}")
            )
        return min(room, NEW_TOKENS_DEFAULT) if asked is None else asked


def _beyond_context(text: str) -> Problem:
    """With the code by which clients find out that a conversation must be shortened."""
    return Problem(400, text, code="context_length_exceeded")


def _teller(loop: asyncio.AbstractEventLoop, progress: asyncio.Queue[Progress]) -> Callable[[Progress], None]:
    def tell(step: Progress) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody listens
            loop.call_soon_threadsafe(progress.put_nowait, step)

    return tell
