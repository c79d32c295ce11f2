"""What goes into generate() and what comes out: the same kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flashclient.errors import OptionError

# Files that hold the tokens of one of transformers' tokenizers; the others of its files go with one of these.
VOCABULARY_PATTERNS = ("tokenizer.json", "*.model", "tokenizer.model.*", "vocab*", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Prompt:
    """Inputs of transformers' generate(), and how its sequences become what the caller expects.

    Attributes:
        inputs: input_ids and attention_mask, [rows, tokens] int64, padded left.
        answer: sequences [rows * returned, tokens] -> text, texts, ids or the tensor itself.
    """

    inputs: dict[str, Tensor]
    answer: Callable[[Tensor], Any]

    @property
    def tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, padding on the left; None where its files hold none."""
    if not any(path for pattern in VOCABULARY_PATTERNS for path in folder.glob(pattern)):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:  # padding is masked: any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def require_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise OptionError("this model was stored without a tokenizer: pass input_ids instead of text")
    return tokenizer


def encode(prompt: Any, tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
    """Takes text, texts, ids, rows of ids, a tensor of either, or a tokenizer's output; OptionError for the rest."""
    if isinstance(prompt, Mapping):
        return _of_ids(prompt["input_ids"], lambda ids: ids, prompt.get("attention_mask"))
    if isinstance(prompt, Tensor):
        return _of_ids(prompt, lambda ids: ids[0] if prompt.dim() == 1 and len(ids) == 1 else ids)
    if isinstance(prompt, str):
        texts = _of_texts([prompt], require_tokenizer(tokenizer))
        return Prompt(texts.inputs, lambda ids: _single(texts.answer(ids)))
    if isinstance(prompt, Sequence) and len(prompt) > 0:
        if all(isinstance(one, str) for one in prompt):
            return _of_texts(list(prompt), require_tokenizer(tokenizer))
        if all(isinstance(one, int) for one in prompt):
            return _of_ids(torch.tensor([list(prompt)]), lambda ids: _single(ids.tolist()))
        if all(isinstance(one, Sequence) and len(one) == len(prompt[0]) for one in prompt):
            return _of_ids(torch.tensor([list(one) for one in prompt]), lambda ids: ids.tolist())
    raise OptionError(
        f"cannot generate from a {type(prompt).__name__}: pass text, a list of texts, input_ids of equal length,"
        " or a tokenizer's output"
    )


def _single(answers: list[Any]) -> Any:
    """One prompt gives one answer, unless num_return_sequences asked for several."""
    return answers[0] if len(answers) == 1 else answers


def _of_ids(ids: Tensor, answer: Callable[[Tensor], Any], mask: Tensor | None = None) -> Prompt:
    rows = ids.unsqueeze(0) if ids.dim() == 1 else ids
    if rows.dim() != 2 or rows.shape[1] == 0 or rows.is_floating_point():
        raise OptionError(f"input_ids of shape {tuple(ids.shape)} and {ids.dtype}: integers [rows, tokens] are needed")
    return Prompt({"input_ids": rows, "attention_mask": torch.ones_like(rows) if mask is None else mask}, answer)


def _of_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    encoded = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    if encoded["input_ids"].shape[1] == 0:
        raise OptionError("the prompt is empty and this model's tokenizer begins with no token: pass some text")
    length = encoded["input_ids"].shape[1]
    inputs = {"input_ids": encoded["input_ids"].long(), "attention_mask": encoded["attention_mask"]}
    return Prompt(inputs, lambda ids: tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True))
