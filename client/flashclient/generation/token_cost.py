"""What a token of a model costs on this machine, apart from reading weights: for `weightd plan`.

The model is built by its record, as a client builds it, and makes tokens in exact mode. Its weights share memory that
is too large for caches, of the kind that the daemon serves. So attention, head and FFNs have their real sizes, and a
model of any size can be tried before it is downloaded.
"""

from __future__ import annotations

import mmap
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, StoppingCriteria

from flashclient._native import Workers
from flashclient.kernels.dtypes import DTYPES
from flashclient.kernels.growing_cache import GrowingCache, row_bytes
from flashclient.model.build import BuiltModel, build_model
from flashclient.model.ffn import Clock
from flashclient.recipes.ffns.tiny import PICKS
from flashclient.source.repeated import ALIGNMENT_BYTES, RepeatedSource, memory_bytes_min
from weightd_proto.encodings import encodings_of, is_plain
from weightd_proto.weightd_pb2 import ImportResponse, Model

MEMORY_BYTES_MIN, MEMORY_BYTES_MAX = 256 << 20, 1 << 30  # a model that is smaller has its own size
CACHE_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")
CACHES = 2  # so many times the last cache: there are processors with 480 MiB
WEIGHT = 1 / 64  # of every weight: sums are neither infinite nor too small for the dtype
QUANTISED_BYTE = 0x24  # of every quantised block: scales of 1 / 62 in half precision
PROMPT_TOKENS = 2
FIRST_TOKENS = 2  # not measured: caches fill
TOKENS_MIN, TOKENS_MAX = 1, 24
SECONDS = 2.0  # then TOKENS_MIN are enough: a token of a large model takes so long that little disturbs it


def token_cost(record: Model, folder: Path) -> ImportResponse:
    """The fields of the response that say what a token costs. Takes seconds.

    Args:
        folder: with config.json. The memory that is needed is MEMORY_BYTES_MAX, or the largest resident tensor; twice
            as much for quantised bundles.
    """
    size_bytes = min(_beyond_caches(), record.bundles_file_bytes + record.resident_file_bytes)
    record, resident_bytes = _overlapping(record, size_bytes)
    memory = _memory(max(size_bytes, resident_bytes, memory_bytes_min(record)))
    torch.from_numpy(memory).view(DTYPES[record.compute_dtype]).fill_(WEIGHT)
    bundles = memory
    if not all(is_plain(each) for layer in record.layers for each in encodings_of(record.bundle, layer)):
        bundles = _memory(max(size_bytes, memory_bytes_min(record)))
        bundles[:] = QUANTISED_BYTE
    source: Any = RepeatedSource(record, memory, bundles)
    built = build_model(record, folder, source, source.placement, Workers(torch.get_num_threads()))
    token_s, ffn_s = _seconds(built)
    plain_bytes, int8_bytes = _kv_bytes(built)
    return ImportResponse(
        ffn_s=ffn_s,
        besides_s=max(0.0, token_s - ffn_s),
        picks=_picks(built.model),
        kv_bytes=plain_bytes,
        kv_int8_bytes=int8_bytes,
    )


def _beyond_caches() -> int:
    """Bytes of which little is left in the processor's caches once all were read."""
    texts = [path.read_text().strip() for path in CACHE_FOLDER.glob("index*/size")]
    kib = [int(text.removesuffix("K")) for text in texts if re.fullmatch(r"\d+K", text)]
    return min(MEMORY_BYTES_MAX, max(MEMORY_BYTES_MIN, CACHES * max(kib, default=0) << 10))


def _overlapping(record: Model, memory_bytes: int) -> tuple[Model, int]:
    """The record with resident tensors that begin anywhere in so much memory, and how far they go."""
    moved = Model()
    moved.CopyFrom(record)
    next_bytes = end_bytes = 0
    for tensor in moved.resident:
        if next_bytes + tensor.size_bytes > memory_bytes:
            next_bytes = 0
        tensor.offset_bytes = next_bytes
        next_bytes += -(-tensor.size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        end_bytes = max(end_bytes, next_bytes)
    return moved, end_bytes


def _memory(size_bytes: int) -> NDArray[np.uint8]:
    descriptor = os.memfd_create("flashclient-cost")
    try:
        os.ftruncate(descriptor, -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        memory = mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)
    return np.frombuffer(memory, np.uint8)


class _Marks(StoppingCriteria):
    """When each token was made, and the time of FFN kernels until then. Stops when enough are known."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.tokens_s: list[float] = []
        self.ffns_s: list[float] = []

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        self.tokens_s.append(time.perf_counter())
        self.ffns_s.append(self._clock.compute_s)
        enough = len(self.tokens_s) >= FIRST_TOKENS + TOKENS_MIN and self.tokens_s[-1] - self.tokens_s[0] > SECONDS
        return torch.full((len(ids),), enough, dtype=torch.bool)


def _seconds(built: BuiltModel) -> tuple[float, float]:
    """The time of a token, and of its FFN kernels."""
    marks = _Marks(built.ffn.clock)
    ids = torch.full((1, PROMPT_TOKENS), 5, dtype=torch.int64)
    tokens = FIRST_TOKENS + TOKENS_MAX
    with torch.no_grad():
        built.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[marks],
        )
    return _typical(marks.tokens_s), _typical(marks.ffns_s)


def _kv_bytes(built: BuiltModel) -> tuple[int, int]:
    """Of the keys and values of a token, plain and in int8; 0 where there are none of the kind."""
    model: Any = built.model
    cache = GrowingCache(model.config)
    if not cache.holds_tokens:
        return 0, 0
    with torch.no_grad():
        model(torch.full((1, 1), 5, dtype=torch.int64), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    held = [one for layer in layers if layer.is_initialized for one in (layer.keys, layer.values)]
    rows = [one.shape[1] * row_bytes(one.shape[3]) for one in held]
    return cache.held_bytes, sum(rows) if built.native_attention else 0


def _typical(marks: Iterable[float]) -> float:
    return float(median(np.diff(list(marks))[FIRST_TOKENS - 1 :]))


def _picks(model: PreTrainedModel) -> int:
    """Experts for each token, by the names that the configs of transformers have for that."""
    values = model.config.get_text_config().to_dict()
    return max((value for name, value in values.items() if re.fullmatch(PICKS, name) and type(value) is int), default=0)
