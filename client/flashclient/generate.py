"""transformers' generate() on a streamed model: its arguments checked, its output in the caller's kind, measured."""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from flashclient.architectures import architecture_of
from flashclient.drafts import Drafts
from flashclient.errors import OptionError
from flashclient.growing_cache import GrowingCache
from flashclient.model import BuiltModel
from flashclient.prompts import Prompt
from flashclient.source import BundleSource
from flashclient.stats import Meter, Stats

NEW_TOKENS_DEFAULT = 256  # where neither the caller nor the model's generation_config sets a length
LENGTH_ARGUMENTS = ("max_new_tokens", "max_length", "generation_config")


class Generator:
    """Runs one generation at a time; the caller holds the lock that makes this true."""

    def __init__(self, built: BuiltModel, source: BundleSource, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._model: Any = built.model  # typed as a module, whose generate and forward mypy takes for tensors
        self._total = built.total
        self._steps = built.steps
        self._source = source
        self._drafts = Drafts(built.model)
        self._tokenizer = tokenizer
        self._known = _known_arguments(self._model)
        self._positions: int = self._model.config.max_position_embeddings
        self._positions_end = architecture_of(self._model.config)[1].positions_end

    def run(self, prompt: Prompt, arguments: dict[str, Any]) -> tuple[Any, Stats]:
        """What transformers returns, in the prompt's kind unless a dict was asked for, and what it took."""
        arguments = self._completed(arguments, prompt.tokens)
        assistant = arguments.get("assistant_model")
        drafted = assistant is not None or arguments.get("prompt_lookup_num_tokens") is not None
        meter = Meter(self._source, self._total.clock)
        if self._steps is not None:
            self._steps.begin(prompt.tokens, None if drafted else self._end_tokens(arguments))
        try:
            with meter.watching(self._model, assistant):
                output = self._model.generate(**prompt.inputs, **arguments)
        finally:
            if self._steps is not None:
                self._steps.end()
            self._total.idle()
        sequences = output if isinstance(output, Tensor) else output.sequences
        rows, length = sequences.shape
        stats = meter.finish(
            mode="exact" if self._steps is None else "predict",
            rows=rows,
            prompt_tokens=prompt.tokens,
            new_tokens=rows * (length - prompt.tokens),
            drafted=drafted,
        )
        return (prompt.answer(output) if isinstance(output, Tensor) else output), stats

    def _end_tokens(self, arguments: dict[str, Any]) -> list[int] | None:
        """The tokens after which transformers feeds a row nothing but padding; None for beams, which it reorders."""
        config = arguments.get("generation_config") or self._model.generation_config
        if (arguments.get("num_beams", config.num_beams) or 1) > 1:
            return None
        found = arguments.get("eos_token_id", config.eos_token_id)
        if found is None:
            return None
        return [int(token) for token in np.atleast_1d(np.asarray(found))]

    def _completed(self, arguments: dict[str, Any], prompt_tokens: int) -> dict[str, Any]:
        """Refuses unknown arguments; adds a length, the padding token and, for stop_strings, the tokenizer."""
        for name in arguments:
            if name not in self._known:
                raise OptionError(f"unknown generation argument '{name}': transformers has no such one")
        completed = dict(arguments)
        config = self._model.generation_config
        bounded = any(arguments.get(name) is not None for name in LENGTH_ARGUMENTS)
        if not bounded and config.max_new_tokens is None and config.max_length is None:
            completed["max_new_tokens"] = min(NEW_TOKENS_DEFAULT, max(1, self._positions - prompt_tokens))
        new_tokens = completed.get("max_new_tokens")
        if self._positions_end and new_tokens is not None and prompt_tokens + new_tokens > self._positions:
            raise OptionError(
                f"{prompt_tokens} tokens of prompt and {new_tokens} new ones are more than the model's "
                f"{self._positions} positions: shorten the prompt or lower max_new_tokens"
            )
        if config.pad_token_id is None and self._tokenizer is not None and "generation_config" not in arguments:
            completed.setdefault("pad_token_id", self._tokenizer.pad_token_id)
        if "stop_strings" in arguments and self._tokenizer is not None:
            completed.setdefault("tokenizer", self._tokenizer)
        if arguments.get("assistant_model") is not None:
            completed["assistant_model"] = self._drafts.model(arguments["assistant_model"])
        if self._uses_default_cache(arguments):
            completed["past_key_values"] = GrowingCache(self._model.config)
        return completed

    def _uses_default_cache(self, arguments: dict[str, Any]) -> bool:
        """Whether transformers would make a DynamicCache: nobody gave a cache, named a kind of it, or wants none."""

        def setting(name: str) -> Any:
            configs = (arguments.get("generation_config"), self._model.generation_config)
            values = (arguments.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in values if value is not None), None)

        unasked = arguments.get("past_key_values") is None and setting("cache_implementation") is None
        return unasked and setting("use_cache") is not False


def _known_arguments(model: Any) -> set[str]:
    """Every name that transformers' generate() takes for this model."""
    names = set(vars(GenerationConfig()))  # type: ignore[no-untyped-call]
    for function in (model.generate, model.forward):
        names |= set(inspect.signature(function).parameters)
    return names - {"self", "kwargs", "inputs", "input_ids", "attention_mask"} | {"tokenizer"}


class _StopWhen(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._event.is_set(), dtype=torch.bool)


class TextStream(TextStreamer):
    """Text pieces of a generation that runs on a thread of its own, which ends when the reader stops reading."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._abandoned = threading.Event()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._pieces.put(text)

    def pieces(self, generate: Any, prompt: Any, arguments: dict[str, Any]) -> Iterator[str]:
        """Starts generate(prompt, **arguments) and yields its text as it comes; raises what it raises."""
        criteria = StoppingCriteriaList([*(arguments.get("stopping_criteria") or []), _StopWhen(self._abandoned)])
        arguments = {**arguments, "streamer": self, "stopping_criteria": criteria}
        worker = threading.Thread(target=self._run, args=(generate, prompt, arguments), name="flashclient-generate")
        worker.start()
        try:
            while (piece := self._pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self._abandoned.set()
            worker.join()

    def _run(self, generate: Any, prompt: Any, arguments: dict[str, Any]) -> None:
        try:
            generate(prompt, **arguments)
        except BaseException as error:  # handed to the reader, who raises it
            self._pieces.put(error)
        else:
            self._pieces.put(None)
