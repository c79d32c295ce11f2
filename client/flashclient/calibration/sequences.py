"""A text file as token sequences for calibration and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashclient.errors import OptionError

TOKENS_MIN = 1024  # fewer do not show how often a neuron fires
SEQUENCE_TOKENS_MAX = 512
SEQUENCES_MIN = 16  # a short text gives shorter sequences instead of fewer
PIECE_CHARACTERS = 2**20


def read_sequences(path: Path, tokenizer: Any, length_max: int | None, tokens: int | None, tokens_max: int) -> Tensor:
    """The beginning of the text at `path`, cut into sequences of equal length.

    If the tokenizer puts a token before each text, every sequence begins with it.

    Args:
        length_max: the number of tokens in the longest sequence that the model takes; None if it does not say.
        tokens: the number in all sequences together; None for all of the text, up to `tokens_max`.

    Returns:
        [sequences, length] int64.

    Raises:
        OptionError: the file cannot be read, is not UTF-8, or is too short.
    """
    if tokens is not None and tokens < TOKENS_MIN:
        raise OptionError(f"--tokens {tokens} are too few: at least {TOKENS_MIN} are needed")
    prefix: list[int] = tokenizer("").input_ids[:1]
    ids = _read_ids(path, tokenizer, tokens or tokens_max)
    if not ids:
        raise OptionError(f"{path} is empty: pass a text of at least {TOKENS_MIN} tokens")
    if len(ids) < max(TOKENS_MIN, tokens or 0):
        what = f"--tokens asks for {tokens}" if tokens else f"at least {TOKENS_MIN} are needed"
        raise OptionError(f"{path} has {len(ids)} tokens and {what}: pass a longer text")
    length = min(SEQUENCE_TOKENS_MAX, length_max or SEQUENCE_TOKENS_MAX, len(ids) // SEQUENCES_MIN)
    new_tokens = length - len(prefix)
    rows = torch.tensor(ids[: len(ids) // new_tokens * new_tokens]).view(-1, new_tokens)
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(len(rows), -1), rows], dim=1)


def check_text(path: Path) -> None:
    """Raises OptionError if the text at `path` cannot be read or is empty, before any model is loaded."""
    if not next(_pieces(path), ""):
        raise OptionError(f"{path} is empty: pass a text of at least {TOKENS_MIN} tokens")


def _read_ids(path: Path, tokenizer: Any, tokens: int) -> list[int]:
    ids: list[int] = []
    for piece in _pieces(path):
        ids += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        if len(ids) >= tokens:
            return ids[:tokens]
    return ids


def _pieces(path: Path) -> Iterator[str]:
    """The text in pieces of whole lines, so that the tokens are those of the text in one piece."""
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(PIECE_CHARACTERS):
                yield piece + file.readline(PIECE_CHARACTERS)
    except OSError as error:
        raise OptionError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not text in UTF-8: {error.reason} ({error.object[error.start]:#04x})") from error
