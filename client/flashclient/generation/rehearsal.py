"""The rehearsal of an import: tries what a client does with a model's files before any weights are written.

It builds the model as a client does, with weights that are all zero and take no memory, and runs it. So an import is
refused if its files cannot be read, or the model's class, attention or kernels refuse the model.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from flashclient._native import Workers
from flashclient.model.build import build_model, read_generation_config
from flashclient.model.loaded import load_tokenizer
from flashclient.source.repeated import RepeatedSource, memory_bytes_min
from weightd_proto import weightd_pb2

MAP_NORESERVE = 0x4000  # Linux's; Python names it since 3.13
PROMPT_TOKENS = 2
REASON_CHARACTERS_MAX = 400


class RefusedFileError(Exception):
    """Names a file of the model and says why a client cannot use it, in one line."""


def _zeros(record: weightd_pb2.Model) -> RepeatedSource:
    """All bundles share the same memory."""
    size_bytes = max(record.resident_file_bytes, mmap.PAGESIZE)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE  # pages that are never written take no memory
    resident = np.frombuffer(mmap.mmap(-1, size_bytes, flags), np.uint8)
    return RepeatedSource(record, resident, np.zeros(memory_bytes_min(record), np.uint8))


def rehearse(record: weightd_pb2.Model, folder: Path) -> list[str]:
    """Builds the model of `record`, whose files are in `folder`, and makes a token with it. Returns notes for the user.

    Raises:
        RefusedFileError: a client could not do so.
    """
    source: Any = _zeros(record)
    with _blamed(folder / GENERATION_CONFIG_NAME):
        read_generation_config(folder)
    with _blamed(folder / CONFIG_NAME):
        model: Any = build_model(record, folder, source, source.placement, Workers(1)).model
        ids = torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64)
        with torch.no_grad():
            model(ids)
    with _blamed(folder / "tokenizer files"):
        tokenizer = load_tokenizer(folder)
        if tokenizer is not None:
            tokenizer("a")
    with _blamed(folder / GENERATION_CONFIG_NAME):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, tokenizer=tokenizer)
    return _notes(record.name, tokenizer)


def _notes(name: str, tokenizer: Any) -> list[str]:
    """What a conversation would lack."""
    if tokenizer is None:
        return [f"{name} has no tokenizer, so it takes token ids instead of text, and cannot chat"]
    if tokenizer.chat_template is None:
        return [f"{name} has no chat template, as base models have none: a chat continues its text"]
    return []


@contextmanager
def _blamed(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # libraries raise anything for a file of unknown origin
        said = str(error).replace(f"{file.parent}/", "")  # the folder is deleted before a user reads this
        reason = re.sub(r"\s+", " ", said).strip()[:REASON_CHARACTERS_MAX]
        raise RefusedFileError(f"{file.name}: {reason or type(error).__name__}") from error
