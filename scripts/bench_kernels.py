#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Compares the client's kernels with the speed at which the same threads read the same memory.

All weights are views of one bfloat16 buffer of at least eight times the last-level cache. A kernel uses the whole
buffer before it uses a part again, so nothing that it reads is in a cache. Bundles are picked at random: a tenth of a
layer is predicted, a third of that fires. Only bytes that the kernel needs are counted: gate or up rows of predicted
neurons, up rows and down columns of firing ones. Kernel and plain reading take turns in ABBA order.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from flags import FlagParser

import flashclient  # noqa: F401  # isort: skip  # before torch: it tells torch's idle threads to sleep
import numpy as np
import torch
from benchmarks.memory_read import read_memory
from benchmarks.report import Row, Target, abba, machine_facts, report
from numpy.typing import NDArray
from torch.nn import functional

from flashclient._native import Attention, Ffn, LentMemory, Linear, LowRankPredictor, Workers
from flashclient.kernels.arrays import array_of
from flashclient.kernels.decode_attention import attend
from weightd_proto.encodings import BLOCK_FORMATS, SLAB_NEURONS_MIN, in_blocks, plain, stored_bytes
from weightd_proto.weightd_pb2 import Encoding

BUFFER_OVER_CACHE = 8  # a pass over the bundles reads just over half of the buffer
BUFFER_BYTES_MIN = 352 * 2**20  # room for the largest matrix
PREDICTED_SHARE = 0.10
FIRING_SHARE = 0.033
LAYER_NEURONS = 8192
ENCODED_HIDDEN_SIZE = 2048
LINE_BYTES = 64
RANK = 128
ELEMENT_BYTES = 2
ROUNDS = 5

BUNDLES = (  # hidden_size, gated
    (2048, False),  # OPT-1.3B: 8 KiB
    (4096, False),  # OPT-6.7B: 16 KiB
    (4096, True),  # Llama-7B: 24 KiB
)
MATRICES = (  # what, rows, columns
    ("attention of OPT-1.3B", 2048, 2048),
    ("head of OPT-1.3B", 50272, 2048),
    ("head of Gemma 3 270M", 262144, 640),
)
CONTEXTS = (512, 2048)  # cached tokens
HEADS, HEAD_ELEMENTS = 32, 64  # OPT-1.3B


class Arena:
    """A buffer of random weights that is larger than the caches, and the threads that read it."""

    def __init__(self, threads: int) -> None:
        self.workers = Workers(threads)
        self.bytes = max(BUFFER_BYTES_MIN, BUFFER_OVER_CACHE * last_level_cache_bytes())
        mapped = mmap.mmap(-1, self.bytes)
        mapped.madvise(mmap.MADV_HUGEPAGE)  # as the daemon asks for its pool
        random = torch.randn(2**20).mul(0.02).bfloat16().view(torch.uint16).numpy()
        self.bits = np.frombuffer(mapped, np.uint16)
        self.bits[:] = np.resize(random, len(self.bits))
        self.address = self.bits.ctypes.data
        self.lent = LentMemory(self.bits)

    def read_s(self) -> float:
        start_s = time.perf_counter()
        read_memory(self.bits, self.workers.threads)
        return time.perf_counter() - start_s

    def matrices(self, rows: int, columns: int) -> list[NDArray[np.uint16]]:
        count = len(self.bits) // (rows * columns)
        return list(self.bits[: count * rows * columns].reshape(count, rows, columns))


def last_level_cache_bytes() -> int:
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=32 * 2**20)


def compare(arena: Arena, work: Callable[[], None], work_bytes: int, rounds: int) -> Row:
    """The speed of `work`, which reads `work_bytes`, and of plain reading."""

    def work_s() -> float:
        start_s = time.perf_counter()
        work()
        return time.perf_counter() - start_s

    work()
    kernel, memory = abba(work_s, arena.read_s, rounds)
    kernel_gbps, memory_gbps = work_bytes / median(kernel) / 1e9, arena.bytes / median(memory) / 1e9
    return {"GB_per_s": kernel_gbps, "memory_GB_per_s": memory_gbps, "over_memory_ratio": kernel_gbps / memory_gbps}


def sparse_row(arena: Arena, hidden_size: int, gated: bool, tokens: int = 1, rounds: int = ROUNDS) -> Row:
    """fire() and accumulate() over layer after layer of scattered bundles."""
    row_bytes, parts = hidden_size * ELEMENT_BYTES, 3 if gated else 2
    predicted, fired = round(PREDICTED_SHARE * LAYER_NEURONS), round(FIRING_SHARE * LAYER_NEURONS)
    random = np.random.default_rng(0)
    bundles = random.permutation(arena.bytes // (parts * row_bytes)).astype(np.uint64)
    layers = np.sort(bundles[: len(bundles) // predicted * predicted].reshape(-1, predicted))
    lists = list(np.uint64(arena.address) + layers * np.uint64(parts * row_bytes))
    kernels = Ffn(arena.workers, [plain("BF16")] * (3 if gated else 2), hidden_size, "relu")
    x = random.standard_normal((tokens, hidden_size)).astype(np.float32)
    biases = np.zeros((parts - 1, predicted), np.float32)
    biases[0] = np.where(random.permutation(predicted) < fired, 1e3, -1e3)  # decides which fire
    index, masks = np.arange(predicted, dtype=np.uint32), np.full(predicted, 2**tokens - 1, np.uint16)
    h, y = np.empty((predicted, tokens), np.float32), np.zeros((tokens, hidden_size), np.float32)

    def work() -> None:
        for addresses in lists:
            kernels.fire(addresses, index, masks, biases, x, h)
            kernels.accumulate(addresses, h, y)

    read_bytes = len(lists) * row_bytes * (predicted + (parts - 1) * fired)
    row = compare(arena, work, read_bytes, rounds)
    assert np.count_nonzero(h[:, 0]) == fired
    return {"kernel": "sparse FFN", "bundle_bytes": parts * row_bytes, "tokens": tokens, "read_bytes": read_bytes} | row


def encoded_row(arena: Arena, encoding: Encoding, tokens: int = 1, rounds: int = ROUNDS) -> Row:
    """All neurons of layer after layer, stored in `encoding`. The numbers are small: their bytes are those of halves of
    1 / 64 to 1 / 32, and of exponents of 2^-11 to 2^-8. Zeros would not be read."""
    data = arena.bits.view(np.uint8)
    least = 0x74 if encoding.format == "MXFP4" else 0x24
    data[:] = np.resize(np.random.default_rng(0).integers(least, least + 4, 2**20 + 1, np.uint8), len(data))
    bundle_bytes = 3 * stored_bytes(encoding, ENCODED_HIDDEN_SIZE)
    stride_bytes = -(-bundle_bytes // LINE_BYTES) * LINE_BYTES
    layers = len(data) // stride_bytes // LAYER_NEURONS
    bundles = np.arange(layers * LAYER_NEURONS, dtype=np.uint64).reshape(layers, -1)
    lists = list(np.uint64(arena.address) + bundles * np.uint64(stride_bytes))
    kernels = Ffn(arena.workers, [encoding] * 3, ENCODED_HIDDEN_SIZE, "silu")
    x = np.random.default_rng(0).standard_normal((tokens, ENCODED_HIDDEN_SIZE)).astype(np.float32)
    y = np.zeros_like(x)

    def work() -> None:
        for addresses in lists:
            kernels.add_rows(addresses, None, None, x, y)

    read_bytes = bundles.size * bundle_bytes
    row = compare(arena, work, read_bytes, rounds)
    return {"kernel": "FFN", "encoding": encoding.format, "tokens": tokens, "read_bytes": read_bytes} | row


def slab_row(arena: Arena, encoding: Encoding, tokens: int = 1, rounds: int = ROUNDS) -> Row:
    """All neurons, in slabs. The numbers are those that encoded_row() has written."""
    neurons = max(SLAB_NEURONS_MIN, encoding.block_values)
    slab_bytes = 3 * stored_bytes(encoding, ENCODED_HIDDEN_SIZE * neurons)
    stride_bytes = -(-slab_bytes // LINE_BYTES) * LINE_BYTES
    count = arena.bytes // stride_bytes
    addresses = np.uint64(arena.address) + np.arange(count, dtype=np.uint64) * np.uint64(stride_bytes)
    lists = np.array_split(addresses, max(1, count * neurons // LAYER_NEURONS))
    kernels = Ffn(arena.workers, [encoding] * 3, ENCODED_HIDDEN_SIZE, "silu", neurons=neurons)
    x = np.random.default_rng(0).standard_normal((tokens, ENCODED_HIDDEN_SIZE)).astype(np.float32)
    y = np.zeros_like(x)

    def work() -> None:
        for some in lists:
            kernels.add_rows(some, None, None, x, y)

    row = compare(arena, work, count * slab_bytes, rounds)
    facts = {"kernel": "FFN in slabs", "encoding": encoding.format, "tokens": tokens, "read_bytes": count * slab_bytes}
    return facts | row


def linear_row(arena: Arena, what: str, rows: int, columns: int, tokens: int, rounds: int = ROUNDS) -> Row:
    """The native matrix product, then torch's, over as many matrices as the buffer holds."""
    matrices = arena.matrices(rows, columns)
    tensors = [torch.from_numpy(matrix.view(np.int16)).view(torch.bfloat16) for matrix in matrices]
    kernel = Linear(arena.workers, "BF16")
    x, y = torch.randn(tokens, columns), torch.empty(tokens, rows)
    rounded = x.bfloat16()

    def native() -> None:
        for matrix in matrices:
            kernel.multiply(matrix, array_of(x), array_of(y))

    def by_torch() -> None:
        for tensor in tensors:
            functional.linear(rounded, tensor)

    read_bytes = sum(matrix.nbytes for matrix in matrices)
    torch_row = compare(arena, by_torch, read_bytes, 1)
    row = compare(arena, native, read_bytes, rounds) | {"torch_over_memory_ratio": torch_row["over_memory_ratio"]}
    return {"kernel": "linear", "matrix": what, "tokens": tokens, "read_bytes": read_bytes} | row


def predictor_row(arena: Arena, hidden_size: int, rank: int = RANK, rounds: int = ROUNDS) -> Row:
    """Low-rank predictors of layer after layer."""
    output_bytes = LAYER_NEURONS * rank
    rows = rank + output_bytes // (hidden_size * ELEMENT_BYTES)  # input of 16 bits, output of bytes
    bias, scale = np.full(LAYER_NEURONS, -1, np.float32), np.ones(LAYER_NEURONS, np.float32)
    layers = [
        LowRankPredictor(
            arena.workers, "BF16", part[:rank], part[rank:].view(np.int8).reshape(LAYER_NEURONS, rank), bias, scale
        )
        for part in arena.matrices(rows, hidden_size)
    ]
    x = np.random.default_rng(0).standard_normal((1, hidden_size)).astype(np.float32)

    def work() -> None:
        for layer in layers:
            layer.predict(x)

    read_bytes = len(layers) * (rows * hidden_size * ELEMENT_BYTES + bias.nbytes + scale.nbytes)
    facts = {"kernel": "low-rank predictor", "rank": rank, "neurons": LAYER_NEURONS, "tokens": 1}
    return facts | {"read_bytes": read_bytes} | compare(arena, work, read_bytes, rounds)


def attention_row(arena: Arena, cached_tokens: int, rounds: int = ROUNDS) -> Row:
    """The native attention of one token, then transformers' own, over the caches of layer after layer."""
    shape = (2, 1, HEADS, cached_tokens, HEAD_ELEMENTS)  # keys and values
    layers = [
        torch.from_numpy(part.view(np.int16)).view(torch.bfloat16).view(shape)
        for part in arena.matrices(2 * HEADS * cached_tokens, HEAD_ELEMENTS)
    ]
    query = torch.randn(1, HEADS, 1, HEAD_ELEMENTS).bfloat16()
    by_torch, native = torch.nn.Module(), torch.nn.Module()
    native.decode_kernels = {torch.bfloat16: Attention(arena.workers, "BF16")}  # type: ignore[assignment]

    def over_all(module: torch.nn.Module) -> None:
        for keys, values in layers:
            attend(module, query, keys, values, None)

    read_bytes = sum(layer.nbytes for layer in layers)
    torch_row = compare(arena, partial(over_all, by_torch), read_bytes, 1)
    row = compare(arena, partial(over_all, native), read_bytes, rounds)
    facts = {"kernel": "attention", "cached_tokens": cached_tokens, "tokens": 1, "read_bytes": read_bytes}
    return facts | row | {"torch_over_memory_ratio": torch_row["over_memory_ratio"]}


def slowdown(rows: list[Row]) -> float:
    """The most by which 16 tokens take longer than one. `rows`: of one token and of 16, in turn."""
    return max(
        float(many["read_bytes"] / many["GB_per_s"] / (few["read_bytes"] / few["GB_per_s"]))
        for few, many in zip(rows[0::2], rows[1::2], strict=True)
    )


def main() -> int:
    parser = FlagParser(__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    arena = Arena(options.threads)
    machine = machine_facts(Path()) | {
        "threads": options.threads,
        "cache_bytes": last_level_cache_bytes(),
        "instruction_set": Linear(arena.workers, "BF16").instruction_set,
    }
    sparse = [
        sparse_row(arena, hidden, gated, tokens, options.rounds) for hidden, gated in BUNDLES for tokens in (1, 16)
    ]
    linear = [linear_row(arena, *matrix, tokens, options.rounds) for matrix in MATRICES for tokens in (1, 16)]
    predictor = predictor_row(arena, BUNDLES[0][0], rounds=options.rounds)
    attention = [attention_row(arena, cached_tokens, options.rounds) for cached_tokens in CONTEXTS]
    encodings = [plain("BF16"), *map(in_blocks, BLOCK_FORMATS)]  # last: they write into the buffer
    encoded, slabs = [], []
    for encoding in encodings:
        for tokens in (1, 16):
            encoded.append(encoded_row(arena, encoding, tokens, options.rounds))
            slabs.append(slab_row(arena, encoding, tokens, options.rounds))
    of_one = {
        "sparse_ffn_8_kib": sparse[0:1],
        "sparse_ffn": sparse[2::2],
        "linear": linear[0::2],
        "predictor": [predictor],
        "attention": attention,
        "encodings": encoded[2::2],
        "slabs": slabs[2::2],
    }
    targets = [
        Target(
            f"{kernel}_over_memory_bandwidth_ratio",
            min(row["over_memory_ratio"] for row in rows),
            "x",
            0.8 if kernel == "sparse_ffn_8_kib" else 0.9,
            "higher",
        )
        for kernel, rows in of_one.items()
    ] + [
        Target(f"{kernel}_16_rows_over_1_time_ratio", slowdown(rows), "x", 2.0, "lower")
        for kernel, rows in (("sparse_ffn", sparse), ("linear", linear))
    ]
    report(machine, [*sparse, *linear, predictor, *attention, *encoded, *slabs], targets, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
