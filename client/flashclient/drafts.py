"""Draft models of speculative decoding (arXiv 2211.17192): small ones, wholly in memory, that propose tokens.

A draft's proposals change how many tokens a forward pass checks, never which ones are made: with greedy decoding the
text is that of the model without it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from flashclient.errors import ModelError, OptionError

# A pass checks these and one more, and the sparse FFN takes 16 rows at once; the likelihood that all of many are right
# is small, and every wrong one makes the pass read more.
DRAFT_TOKENS_DEFAULT = 5
DRAFT_TOKENS_MAX = 15


class Drafts:
    """Those that one model was asked to work with; a path is loaded once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._vocabulary: int = model.config.vocab_size
        self._dtype: torch.dtype = model.dtype
        self._loaded: dict[Path, Any] = {}

    def model(self, given: Any) -> Any:
        """The model itself, or what the checkpoint folder at this path holds.

        Raises:
            OptionError: there is no such folder, or it proposes more tokens than a pass takes.
            ModelError: transformers cannot load it, or it has another vocabulary.
        """
        if not isinstance(given, str | os.PathLike):
            return self._checked(given)
        folder = Path(given).resolve()
        if folder not in self._loaded:
            self._loaded[folder] = self._load(folder)
        return self._loaded[folder]

    def _load(self, folder: Path) -> Any:
        if not (folder / "config.json").exists():
            raise OptionError(f"assistant_model={folder} has no config.json: pass a checkpoint folder or a model")
        try:
            draft: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self._dtype)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"the draft model at {folder} cannot be loaded: {reason}") from error
        draft.eval()
        if draft.config.vocab_size != self._vocabulary:
            raise ModelError(
                f"the draft model at {folder} has a vocabulary of {draft.config.vocab_size} tokens, the model of "
                f"{self._vocabulary}: use a draft with the model's own tokenizer"
            )
        draft.generation_config.num_assistant_tokens = DRAFT_TOKENS_DEFAULT
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        return draft

    def _checked(self, draft: Any) -> Any:
        config = getattr(draft, "generation_config", None)
        if config is None:
            raise OptionError(f"assistant_model is a {type(draft).__name__}: pass a transformers model or a path")
        if config.num_assistant_tokens is None:
            config.num_assistant_tokens = DRAFT_TOKENS_DEFAULT
        if config.num_assistant_tokens > DRAFT_TOKENS_MAX:
            raise OptionError(
                f"the draft's num_assistant_tokens={config.num_assistant_tokens} is more than {DRAFT_TOKENS_MAX}, "
                "above which a pass reads the whole model: lower it in its generation_config"
            )
        return draft
