"""Draft models of speculative decoding (arXiv 2211.17192): small models, held in memory, that propose tokens.

Proposals change how many tokens a forward pass checks, never the result: with greedy decoding the text is the same as
without a draft model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from flashclient.errors import ModelError, OptionError
from flashclient.model.loaded import load_tokenizer

# A pass checks these tokens and one more, and the sparse FFN takes 16 rows at once. With more tokens, it is less likely
# that all are right, and each wrong one makes the pass read more.
DRAFT_TOKENS_DEFAULT = 5
DRAFT_TOKENS_MAX = 15

# Settings that transformers reads only from the draft model's generation config. It ignores them as arguments.
SETTINGS = (
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
)


class Drafts:
    """The draft models of one model. Each path is loaded once.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._vocabulary: int = model.config.get_text_config().vocab_size
        self._dtype: torch.dtype = model.dtype
        self._tokenizer = tokenizer
        self._loaded: dict[Path, tuple[Any, PreTrainedTokenizerBase | None]] = {}

    def arguments(self, given: Any) -> dict[str, Any]:
        """The arguments of generate() for `given`: a draft model, or the path of its checkpoint folder.

        A draft with another vocabulary needs both tokenizers: its proposals are translated through text.

        Raises:
            OptionError: `given` is not a model, or there is no such folder.
            ModelError: transformers cannot load it, or it has another vocabulary and no tokenizer.
        """
        if not isinstance(given, str | os.PathLike):
            if not hasattr(given, "generation_config") or not hasattr(given, "config"):
                raise OptionError(f"assistant_model is a {type(given).__name__}: pass a transformers model or a path")
            return {"assistant_model": given}
        folder = Path(given).resolve()
        if folder not in self._loaded:
            self._loaded[folder] = self._load(folder)
        draft, tokenizer = self._loaded[folder]
        return {"assistant_model": draft} | ({} if tokenizer is None else {"assistant_tokenizer": tokenizer})

    def _load(self, folder: Path) -> tuple[Any, PreTrainedTokenizerBase | None]:
        if not (folder / "config.json").exists():
            raise OptionError(f"assistant_model={folder} has no config.json: pass a checkpoint folder or a model")
        try:
            draft: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self._dtype)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"the draft model at {folder} cannot be loaded: {reason}") from error
        draft.eval()
        draft.generation_config.num_assistant_tokens = DRAFT_TOKENS_DEFAULT
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        vocabulary = draft.config.get_text_config().vocab_size
        if vocabulary == self._vocabulary:
            return draft, None
        tokenizer = None if self._tokenizer is None else load_tokenizer(folder)
        if tokenizer is None:
            raise ModelError(
                f"the draft model at {folder} has a vocabulary of {vocabulary} tokens, the model of "
                f"{self._vocabulary}: both need a tokenizer, or use a draft with the model's own"
            )
        return draft, tokenizer


@contextmanager
def drafting(draft: Any, arguments: Mapping[str, Any], given: GenerationConfig | None) -> Iterator[None]:
    """Inside the `with` statement the draft model's config has the settings of the call.

    Raises:
        OptionError: more tokens than a pass can check.
    """
    config = draft.generation_config
    before = {name: getattr(config, name) for name in SETTINGS}
    wanted = {name: getattr(given, name, None) for name in SETTINGS} | {
        name: arguments[name] for name in SETTINGS if name in arguments
    }
    try:
        for name, value in wanted.items():
            if value is not None:
                setattr(config, name, value)
        if config.num_assistant_tokens is None:
            config.num_assistant_tokens = DRAFT_TOKENS_DEFAULT
        if not 0 < config.num_assistant_tokens <= DRAFT_TOKENS_MAX:
            raise OptionError(
                f"num_assistant_tokens={config.num_assistant_tokens} must be from 1 to {DRAFT_TOKENS_MAX}: with more "
                "a pass reads the whole model; pass a smaller number, or set it in the draft's generation_config"
            )
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
