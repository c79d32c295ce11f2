"""What a token of a model costs on this machine, apart from reading weights: for `weightd plan`.

The kernels' speed is measured with a matrix that is too large for caches, in memory of the kind that the daemon serves.
What a token costs besides is what it costs a tiny instance of the model's class, whose weights take no time.
"""

from __future__ import annotations

import mmap
import os
import re
import time
from statistics import median

import torch
from transformers import PreTrainedModel

from flashclient._native import Linear, Workers
from flashclient.kernels.arrays import array_of
from flashclient.kernels.dtypes import DTYPES
from flashclient.recipes.derive import Derived
from flashclient.recipes.ffns.tiny import PICKS
from flashclient.torch_state import one_thread
from weightd_proto.weightd_pb2 import ImportResponse

COLUMNS = 4096
MATRIX_BYTES = 256 << 20
PRODUCTS = 7
TOKENS = 24


def token_cost(derived: Derived, dtype: str) -> ImportResponse:
    """The fields of the response that say what a token costs in `dtype`."""
    with one_thread():
        token_s, layer_s = _seconds(derived.streamed)
    overhead_s = token_s + _layers(derived.full) * layer_s
    return ImportResponse(kernel_gb_per_s=kernel_gb_per_s(dtype), overhead_s=overhead_s, picks=_picks(derived.full))


def kernel_gb_per_s(dtype: str) -> float:
    """The speed of a product with one row, in bytes of the matrix, with as many threads as a client has."""
    kernel = Linear(Workers(torch.get_num_threads()), dtype)
    descriptor = os.memfd_create("flashclient-speed")
    try:
        os.ftruncate(descriptor, MATRIX_BYTES)
        memory = mmap.mmap(descriptor, MATRIX_BYTES)
    finally:
        os.close(descriptor)
    weight = torch.frombuffer(memory, dtype=DTYPES[dtype]).view(-1, COLUMNS).fill_(1 / COLUMNS)
    x = torch.ones(1, COLUMNS, dtype=torch.float32)
    y = torch.empty(1, len(weight), dtype=torch.float32)
    seconds = []
    for _ in range(PRODUCTS):
        began_s = time.perf_counter()
        kernel.multiply(array_of(weight), array_of(x), array_of(y))
        seconds.append(time.perf_counter() - began_s)
    return MATRIX_BYTES / median(seconds) / 1e9


def _seconds(model: PreTrainedModel) -> tuple[float, float]:
    """The time that generate() takes for a token beside the model, and the model for a layer."""
    begun_s = 0.0
    passes: list[float] = []

    def begin(*_: object) -> None:
        nonlocal begun_s
        begun_s = time.perf_counter()

    ids = torch.full((1, 2), 5, dtype=torch.int64)
    options = {"do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}
    with (
        torch.no_grad(),
        model.register_forward_pre_hook(begin),
        model.register_forward_hook(lambda *_: passes.append(time.perf_counter() - begun_s)),
    ):
        marks: list[float] = []
        for tokens in (2, TOKENS):
            began_s = time.perf_counter()
            model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, **options
            )
            marks.append(time.perf_counter() - began_s)
    forward_s = median(passes)
    token_s = (marks[1] - marks[0]) / (TOKENS - 2)
    return max(0.0, token_s - forward_s), forward_s / _layers(model)


def _layers(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def _picks(model: PreTrainedModel) -> int:
    """Experts for each token, by the names that the configs of transformers have for that."""
    values = model.config.get_text_config().to_dict()
    return max((value for name, value in values.items() if re.fullmatch(PICKS, name) and type(value) is int), default=0)
