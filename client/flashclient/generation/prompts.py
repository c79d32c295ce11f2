"""Prompts of generate() in every kind, and its answers in the same kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flashclient.errors import OptionError
from flashclient.generation.texts import continuation

IDS = ("inputs", "input_ids")  # transformers' two names for the ids of a prompt
KINDS = "pass text, a list of texts, input_ids, or a tokenizer's output"


@dataclass(frozen=True)
class Prompt:
    """A prompt as arguments of transformers' generate(), and the way back to the caller's kind.

    Attributes:
        inputs: those given of input_ids, attention_mask and inputs_embeds.
        answer: turns sequences [rows * returned, tokens] and the token that pads finished rows into text, texts, or
            ids of the caller's kind.
    """

    inputs: dict[str, Any]
    answer: Callable[[Tensor, int | None], Any]


def require_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, what: str = "input_ids instead of text"
) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise OptionError(f"this model was stored without a tokenizer: pass {what}")
    return tokenizer


def encode(prompt: Any, arguments: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
    """The prompt of a text, texts, ids of any kind, a tokenizer's output, or the inputs among `arguments`.

    Raises:
        OptionError: the prompt is of another kind, missing, or given twice.
    """
    inputs = {name: arguments[name] for name in (*IDS, "inputs_embeds") if arguments.get(name) is not None}
    if prompt is None and not inputs:
        raise OptionError(f"there is no prompt: {KINDS}")
    if isinstance(prompt, Mapping):
        return _of_mapping(prompt, arguments, tokenizer)
    if prompt is not None and (twice := [name for name in IDS if name in inputs]):
        raise OptionError(f"the prompt is given twice, also as {twice[0]}=: pass one of them")
    ids = next((inputs[name] for name in IDS if name in inputs), None) if prompt is None else prompt
    if ids is None:
        return Prompt(inputs, lambda sequences, _: sequences)
    if isinstance(ids, str):
        texts = _of_texts([ids], arguments, tokenizer)
        return Prompt(texts.inputs, lambda sequences, fill: single(texts.answer(sequences, fill)))
    if isinstance(ids, np.ndarray) and ids.dtype.kind == "U":
        ids = ids.tolist()
    if isinstance(ids, Sequence) and len(ids) > 0 and all(isinstance(one, str) for one in ids):
        return _of_texts(list(ids), arguments, tokenizer)
    name = next((name for name in IDS if name in inputs), "input_ids")
    return Prompt(inputs | {name: ids}, answer_of_kind(ids))


def _of_mapping(
    prompt: Mapping[str, Any], arguments: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> Prompt:
    """The prompt of a tokenizer's output, which holds keyword arguments."""
    given = {name: value for name, value in prompt.items() if value is not None}
    for name in given:
        if arguments.get(name) is not None:
            raise OptionError(f"{name} is given twice: in the prompt and as {name}=")
    inner = encode(None, {**arguments, **given}, tokenizer)
    return Prompt({**given, **inner.inputs}, inner.answer)


def answer_of_kind(ids: Any) -> Callable[[Tensor, int | None], Any]:
    """The function that turns sequences into the kind of `ids`."""
    if isinstance(ids, Tensor):
        return lambda sequences, _: sequences[0] if ids.dim() == 1 and len(sequences) == 1 else sequences
    if isinstance(ids, np.ndarray):
        return lambda sequences, _: (sequences[0] if ids.ndim == 1 and len(sequences) == 1 else sequences).numpy()
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes | bytearray) or len(ids) == 0:
        raise OptionError(f"cannot generate from {_named(ids)}: {KINDS}")
    if all(_is_id(one) for one in ids):
        return lambda sequences, _: single(sequences.tolist())
    rows = as_rows("input_ids", ids)
    longest = max(map(len, rows))

    def lists(sequences: Tensor, _: int | None) -> list[list[int]]:
        """Without the padding of shorter rows."""
        returned = len(sequences) // len(rows)
        made = sequences.tolist()
        return [row[longest - len(rows[index // returned]) :] for index, row in enumerate(made)]

    return lists


def _named(value: Any) -> str:
    return f"an empty {type(value).__name__}" if value in ([], ()) else f"a {type(value).__name__}"


def single(answers: list[Any]) -> Any:
    """The answer to one prompt; a list of answers with num_return_sequences."""
    return answers[0] if len(answers) == 1 else answers


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool | np.bool_)


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float)


def as_rows(name: str, value: Any) -> list[list[int]]:
    """Rows of numbers from a tensor, an array, a list of numbers or a list of lists. Raises OptionError."""
    rows: Any = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
    if isinstance(rows, Sequence) and not isinstance(rows, str | bytes | bytearray) and len(rows) > 0:
        rows = [one.tolist() if isinstance(one, Tensor | np.ndarray) else one for one in rows]
        rows = [rows] if not any(isinstance(one, Sequence) for one in rows) else rows
        fits = _is_weight if name == "attention_mask" else _is_id
        if all(isinstance(row, Sequence) and len(row) > 0 and all(map(fits, row)) for row in rows):
            return [list(row) for row in rows]
    raise OptionError(f"{name} is a {type(value).__name__}: pass whole numbers [rows, tokens], without empty rows")


def as_tensors(ids: Any, mask: Any, fill: int) -> tuple[Tensor, Any]:
    """The ids [rows, tokens] int64 and their mask; None if all tokens count, or transformers makes the mask.

    Args:
        fill: the token that shorter rows are padded with, on the left.
    """
    if isinstance(ids, Tensor | np.ndarray):
        tensor = torch.as_tensor(ids)
        rows = tensor.unsqueeze(0) if tensor.dim() == 1 else tensor
        if rows.dim() != 2 or rows.numel() == 0 or rows.is_floating_point() or rows.dtype == torch.bool:
            shape = f"{tuple(tensor.shape)} and {tensor.dtype}"
            raise OptionError(f"input_ids have shape {shape}: pass whole numbers [rows, tokens]")
        return rows.long(), mask
    lists = as_rows("input_ids", ids)
    if len({len(row) for row in lists}) == 1:
        return torch.tensor(lists), mask
    masks = [[1] * len(row) for row in lists] if mask is None else as_rows("attention_mask", mask)
    if [len(row) for row in masks] != [len(row) for row in lists]:
        raise OptionError("the rows of attention_mask and input_ids differ in length: pass a number for each token")
    return padded(lists, fill), padded(masks, 0)


def as_mask(mask: Any) -> Tensor:
    """The mask [rows, tokens] in its own dtype."""
    numbers = mask if isinstance(mask, Tensor | np.ndarray) else as_rows("attention_mask", mask)
    tensor = torch.as_tensor(numbers)
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor


def padded(rows: list[list[int]], fill: int) -> Tensor:
    """[rows, longest], padded on the left."""
    longest = max(map(len, rows))
    return torch.tensor([[fill] * (longest - len(row)) + row for row in rows])


def _of_texts(texts: list[str], arguments: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
    tokenizer = require_tokenizer(tokenizer)
    for name in ("attention_mask", "inputs_embeds", "position_ids"):
        if arguments.get(name) is not None:
            raise OptionError(
                f"{name}= needs input_ids, and the prompt is text: tokenize the text yourself, or leave {name}= out"
            )
    return of_rows([_tokens(text, tokenizer) for text in texts], tokenizer)


def of_rows(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt of tokenized texts. Its answers are the texts that continue them."""
    fill: int = tokenizer.pad_token_id
    mask = padded([[1] * len(row) for row in rows], 0)

    def answer(sequences: Tensor, finished: int | None) -> list[str]:
        returned = len(sequences) // len(rows)
        made = []
        for index, sequence in enumerate(sequences.tolist()):
            prompt = rows[index // returned]
            made.append(continuation(tokenizer, prompt, sequence[mask.shape[1] - len(prompt) :], finished))
        return made

    return Prompt({"input_ids": padded(rows, fill), "attention_mask": mask}, answer)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of `text`, without a second token for its beginning if the text spells that token itself."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise OptionError(f"the prompt is not valid Unicode: it has the surrogate {half}") from error
    row: list[int] = tokenizer(text).input_ids
    if not row:
        raise OptionError("the prompt is empty, and this model's tokenizer adds no first token: pass some text")
    begins = tokenizer.bos_token
    doubled = len(row) > 1 and row[0] == row[1] == tokenizer.bos_token_id and text.startswith(str(begins))
    return row[1:] if doubled else row
