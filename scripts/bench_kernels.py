#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Compares the client's kernels with the speed at which the same threads read the same memory.

All weights are views of one bfloat16 buffer of at least eight times the last-level cache. A kernel uses the whole
buffer before it uses a part again, so nothing that it reads is in a cache. Each measurement takes the next eighth of
the buffer. Bundles are picked at random: a tenth of a layer is predicted, a third of that fires. Only bytes that the
kernel needs are counted: gate or up rows of predicted neurons, up rows and down columns of firing ones. Kernel and
plain reading take turns in ABBA order.
"""

from __future__ import annotations

import itertools
import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TypeVar

from flags import FlagParser

import flashclient  # noqa: F401  # isort: skip  # before torch: it tells torch's idle threads to sleep
import numpy as np
import torch
from benchmarks.memory_read import read_memory
from benchmarks.report import Row, Target, abba, machine_facts, report
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flashclient._native import Attention, EncodedMatrix, Ffn, FfnSum, LentMemory, Linear, LowRankPredictor, Workers
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
ROUNDS = 4

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
TOKENS = (1, 16)
HEADS, HEAD_ELEMENTS = 32, 64  # OPT-1.3B


OF_F32 = [format for format, record in BLOCK_FORMATS.items() if record.scale_dtype == "F32"]

Item = TypeVar("Item")


class Arena:
    """A buffer of random weights that is larger than the caches, and the threads that read it."""

    def __init__(self, threads: int) -> None:
        self.workers = Workers(threads)
        self.bytes = max(BUFFER_BYTES_MIN, BUFFER_OVER_CACHE * last_level_cache_bytes())
        mapped = mmap.mmap(-1, self.bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapped.madvise(mmap.MADV_HUGEPAGE)  # as the daemon asks for its pool
        self.bits = np.frombuffer(mapped, np.uint16)
        self.pattern = np.zeros(0, np.uint8)
        self.fill(torch.randn(2**20).mul(0.02).bfloat16().view(torch.uint8).numpy())
        self.address = self.bits.ctypes.data
        self.lent = LentMemory(self.bits)
        self.parts = itertools.cycle(np.array_split(self.bits, BUFFER_OVER_CACHE))

    def fill(self, pattern: NDArray[np.uint8]) -> None:
        """Repeats the pattern, unless it is there already."""
        if np.array_equal(self.pattern, pattern):
            return
        data = self.bits.view(np.uint8)
        for start in range(0, len(data), len(pattern)):
            data[start : start + len(pattern)] = pattern[: len(data) - start]
        self.pattern = pattern

    def read_s(self, bits: NDArray[np.uint16] | None = None) -> float:
        start_s = time.perf_counter()
        read_memory(self.bits if bits is None else bits, self.workers.threads)
        return time.perf_counter() - start_s

    def speed_of_part(self) -> float:
        """Of reading the next part of the buffer, in GB/s."""
        part = next(self.parts)
        return part.nbytes / self.read_s(part) / 1e9

    def matrices(self, rows: int, columns: int) -> list[NDArray[np.uint16]]:
        count = len(self.bits) // (rows * columns)
        return list(self.bits[: count * rows * columns].reshape(count, rows, columns))


def last_level_cache_bytes() -> int:
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=32 * 2**20)


def compare(arena: Arena, work: Callable[[Item], None], items: Sequence[Item], item_bytes: int, rounds: int) -> Row:
    """The speed of `work`, which reads `item_bytes` of an item, and of plain reading. `items`: all of the buffer."""
    turn = itertools.cycle(items)
    count = -(-len(items) // BUFFER_OVER_CACHE)

    def work_s() -> float:
        some = list(itertools.islice(turn, count))
        start_s = time.perf_counter()
        for item in some:
            work(item)
        return time.perf_counter() - start_s

    work_s()
    kernel, memory = abba(work_s, arena.speed_of_part, rounds)
    kernel_gbps, memory_gbps = count * item_bytes / median(kernel) / 1e9, median(memory)
    speeds = {"GB_per_s": kernel_gbps, "memory_GB_per_s": memory_gbps, "over_memory_ratio": kernel_gbps / memory_gbps}
    return {"read_bytes": count * item_bytes} | speeds


def inputs(tokens: int, columns: int) -> NDArray[np.float32]:
    """Random x in fp32, whose numbers bf16 holds: layers of a model of 16 bit pass on such."""
    return torch.randn(tokens, columns).bfloat16().float().numpy()


def sparse_row(arena: Arena, hidden_size: int, gated: bool, tokens: int = 1, rounds: int = ROUNDS) -> Row:
    """fire() and accumulate() over layer after layer of scattered bundles."""
    row_bytes, parts = hidden_size * ELEMENT_BYTES, 3 if gated else 2
    predicted, fired = round(PREDICTED_SHARE * LAYER_NEURONS), round(FIRING_SHARE * LAYER_NEURONS)
    random = np.random.default_rng(0)
    bundles = random.permutation(arena.bytes // (parts * row_bytes)).astype(np.uint64)
    layers = np.sort(bundles[: len(bundles) // predicted * predicted].reshape(-1, predicted))
    lists = list(np.uint64(arena.address) + layers * np.uint64(parts * row_bytes))
    kernels = Ffn(arena.workers, [plain("BF16")] * (3 if gated else 2), hidden_size, "relu")
    x = inputs(tokens, hidden_size)
    biases = np.zeros((parts - 1, predicted), np.float32)
    biases[0] = np.where(random.permutation(predicted) < fired, 1e3, -1e3)  # decides which fire
    index, masks = np.arange(predicted, dtype=np.uint32), np.full(predicted, 2**tokens - 1, np.uint16)
    h, y = np.empty((predicted, tokens), np.float32), np.zeros((tokens, hidden_size), np.float32)

    def work(addresses: NDArray[np.uint64]) -> None:
        kernels.fire(addresses, index, masks, biases, x, h)
        kernels.accumulate(addresses, h, y)

    row = compare(arena, work, lists, row_bytes * (predicted + (parts - 1) * fired), rounds)
    assert np.count_nonzero(h[:, 0]) == fired
    return {"kernel": "sparse FFN", "bundle_bytes": parts * row_bytes, "tokens": tokens} | row


def fill_for(arena: Arena, encoding: Encoding) -> None:
    """Bytes are those of bfloat16 of 1 / 128 to 1, halves of 1 / 64 to 1 / 32, and exponents of 2^-11 to 2^-8. Zeros
    would not be read, and much smaller numbers would make subnormal ones, with which processors are slow."""
    least = {"BF16": 0x3C, "MXFP4": 0x74}.get(encoding.format, 0x3C if encoding.format in OF_F32 else 0x24)
    arena.fill(np.random.default_rng(0).integers(least, least + 4, 2**20 + 1, np.uint8))


def whole_sum(kernels: Ffn, tokens: int) -> Callable[[NDArray[np.uint64]], None]:
    """What sums over all neurons of a layer, which lie at the addresses that it is given, for random tokens."""
    x = inputs(tokens, ENCODED_HIDDEN_SIZE)
    y = np.zeros_like(x)

    def work(addresses: NDArray[np.uint64]) -> None:
        every_neuron = FfnSum(kernels, x, y)
        every_neuron.add(addresses, None)
        every_neuron.finish()

    return work


def encoded_row(arena: Arena, encoding: Encoding, tokens: int = 1, rounds: int = ROUNDS) -> Row:
    """All neurons of layer after layer, stored in `encoding`."""
    fill_for(arena, encoding)
    bundle_bytes = 3 * stored_bytes(encoding, ENCODED_HIDDEN_SIZE)
    stride_bytes = -(-bundle_bytes // LINE_BYTES) * LINE_BYTES
    layers = arena.bytes // stride_bytes // LAYER_NEURONS
    bundles = np.arange(layers * LAYER_NEURONS, dtype=np.uint64).reshape(layers, -1)
    lists = list(np.uint64(arena.address) + bundles * np.uint64(stride_bytes))
    kernels = Ffn(arena.workers, [encoding] * 3, ENCODED_HIDDEN_SIZE, "silu")
    row = compare(arena, whole_sum(kernels, tokens), lists, LAYER_NEURONS * bundle_bytes, rounds)
    return {"kernel": "FFN", "encoding": encoding.format, "tokens": tokens} | row


def slab_row(arena: Arena, encoding: Encoding, tokens: int = 1, rounds: int = ROUNDS) -> Row:
    """All neurons, in slabs. The numbers are those that encoded_row() has written."""
    neurons = max(SLAB_NEURONS_MIN, encoding.block_values)
    slab_bytes = 3 * stored_bytes(encoding, ENCODED_HIDDEN_SIZE * neurons)
    stride_bytes = -(-slab_bytes // LINE_BYTES) * LINE_BYTES
    slabs = LAYER_NEURONS // neurons  # of a layer
    layers = arena.bytes // stride_bytes // slabs
    addresses = np.arange(layers * slabs, dtype=np.uint64) * np.uint64(stride_bytes)
    lists = list(np.uint64(arena.address) + addresses.reshape(layers, slabs))
    kernels = Ffn(arena.workers, [encoding] * 3, ENCODED_HIDDEN_SIZE, "silu", neurons=neurons)
    row = compare(arena, whole_sum(kernels, tokens), lists, slabs * slab_bytes, rounds)
    return {"kernel": "FFN in slabs", "encoding": encoding.format, "tokens": tokens} | row


def encoded_linear_row(arena: Arena, encoding: Encoding, tokens: int = 1, rounds: int = ROUNDS) -> Row:
    """Products with matrices of 8192 rows in blocks."""
    fill_for(arena, encoding)
    row_bytes = stored_bytes(encoding, ENCODED_HIDDEN_SIZE)
    count = arena.bytes // (LAYER_NEURONS * row_bytes)
    data = arena.bits.view(np.uint8)[: count * LAYER_NEURONS * row_bytes]
    stored = list(data.reshape(count, LAYER_NEURONS, row_bytes))
    matrices = [EncodedMatrix(encoding, rows, ENCODED_HIDDEN_SIZE) for rows in stored]
    kernel = Linear(arena.workers, "F32")
    x = inputs(tokens, ENCODED_HIDDEN_SIZE)
    y = np.empty((tokens, LAYER_NEURONS), np.float32)

    def work(matrix: EncodedMatrix) -> None:
        kernel.multiply(matrix, x, y)

    row = compare(arena, work, matrices, LAYER_NEURONS * row_bytes, rounds)
    return {"kernel": "encoded linear", "encoding": encoding.format, "tokens": tokens} | row


def linear_row(arena: Arena, what: str, rows: int, columns: int, tokens: int, rounds: int = ROUNDS) -> Row:
    """The native matrix product, then torch's, over as many matrices as the buffer holds."""
    matrices = arena.matrices(rows, columns)
    tensors = [torch.from_numpy(matrix.view(np.int16)).view(torch.bfloat16) for matrix in matrices]
    kernel = Linear(arena.workers, "BF16")
    x, y = inputs(tokens, columns), np.empty((tokens, rows), np.float32)
    rounded = torch.from_numpy(x).bfloat16()

    def native(matrix: NDArray[np.uint16]) -> None:
        kernel.multiply(matrix, x, y)

    def by_torch(matrix: Tensor) -> None:
        functional.linear(rounded, matrix)

    torch_row = compare(arena, by_torch, tensors, matrices[0].nbytes, 1)
    row = compare(arena, native, matrices, matrices[0].nbytes, rounds)
    row["torch_over_memory_ratio"] = torch_row["over_memory_ratio"]
    return {"kernel": "linear", "matrix": what, "tokens": tokens} | row


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
    x = inputs(1, hidden_size)

    def work(layer: LowRankPredictor) -> None:
        layer.predict(x)

    layer_bytes = rows * hidden_size * ELEMENT_BYTES + bias.nbytes + scale.nbytes
    facts = {"kernel": "low-rank predictor", "rank": rank, "neurons": LAYER_NEURONS, "tokens": 1}
    return facts | compare(arena, work, layers, layer_bytes, rounds)


def attention_row(arena: Arena, cached_tokens: int, rounds: int = ROUNDS) -> Row:
    """The native attention of one token, then transformers' own, over the caches of layer after layer."""
    shape = (2, 1, HEADS, cached_tokens, HEAD_ELEMENTS)  # keys and values
    layers = [
        torch.from_numpy(part.view(np.int16)).view(torch.bfloat16).view(shape).unbind()
        for part in arena.matrices(2 * HEADS * cached_tokens, HEAD_ELEMENTS)
    ]
    query = torch.randn(1, HEADS, 1, HEAD_ELEMENTS).bfloat16()
    out = torch.empty(1, 1, HEADS, HEAD_ELEMENTS, dtype=torch.bfloat16)
    kernel, scale, module = Attention(arena.workers, "BF16"), HEAD_ELEMENTS**-0.5, torch.nn.Module()

    def native(layer: Sequence[Tensor]) -> None:
        kernel.attend(array_of(query), array_of(layer[0]), array_of(layer[1]), None, False, scale, array_of(out))

    def by_torch(layer: Sequence[Tensor]) -> None:
        attend(module, query, layer[0], layer[1], None)

    layer_bytes = sum(part.nbytes for part in layers[0])
    torch_row = compare(arena, by_torch, layers, layer_bytes, 1)
    row = compare(arena, native, layers, layer_bytes, rounds)
    row["torch_over_memory_ratio"] = torch_row["over_memory_ratio"]
    return {"kernel": "attention", "cached_tokens": cached_tokens, "tokens": 1} | row


def int8_attention_row(arena: Arena, cached_tokens: int, rounds: int = ROUNDS) -> Row:
    """The native attention of one token over keys and values in Q8_0, of layer after layer."""
    encoding = in_blocks("Q8_0")
    fill_for(arena, encoding)
    row_bytes = stored_bytes(encoding, HEAD_ELEMENTS)
    shape = (2, 1, HEADS, cached_tokens, row_bytes)  # keys and values
    layer_bytes = 2 * HEADS * cached_tokens * row_bytes
    count = arena.bytes // layer_bytes
    layers = list(arena.bits.view(np.uint8)[: count * layer_bytes].reshape(count, *shape))
    query, out = torch.randn(1, HEADS, 1, HEAD_ELEMENTS), torch.empty(1, 1, HEADS, HEAD_ELEMENTS)
    kernel, scale = Attention(arena.workers, "F32"), HEAD_ELEMENTS**-0.5

    def work(layer: NDArray[np.uint8]) -> None:
        kernel.attend(array_of(query), layer[0], layer[1], None, False, scale, array_of(out))

    facts = {"kernel": "attention in int8", "cached_tokens": cached_tokens, "tokens": 1}
    return facts | compare(arena, work, layers, layer_bytes, rounds)


def encodings_of(arena: Arena, row: Callable[[Arena, Encoding, int, int], Row], rounds: int) -> list[Row]:
    encodings = [*map(in_blocks, BLOCK_FORMATS)]
    if row is not encoded_linear_row:
        encodings.insert(0, plain("BF16"))
    return [row(arena, encoding, tokens, rounds) for encoding in encodings for tokens in TOKENS]


# The last four write into the buffer.
ROWS: dict[str, Callable[[Arena, int], list[Row]]] = {
    "sparse_ffn": lambda arena, rounds: [
        sparse_row(arena, *one, tokens, rounds) for one in BUNDLES for tokens in TOKENS
    ],
    "linear": lambda arena, rounds: [linear_row(arena, *one, tokens, rounds) for one in MATRICES for tokens in TOKENS],
    "predictor": lambda arena, rounds: [predictor_row(arena, BUNDLES[0][0], rounds=rounds)],
    "attention": lambda arena, rounds: [attention_row(arena, cached_tokens, rounds) for cached_tokens in CONTEXTS],
    "int8_attention": lambda arena, rounds: [int8_attention_row(arena, tokens, rounds) for tokens in CONTEXTS],
    "encoded_linear": lambda arena, rounds: encodings_of(arena, encoded_linear_row, rounds),
    "encodings": lambda arena, rounds: encodings_of(arena, encoded_row, rounds),
    "slabs": lambda arena, rounds: encodings_of(arena, slab_row, rounds),
}


def slowdown(rows: list[Row]) -> float:
    """The most by which 16 tokens take longer than one. `rows`: of one token and of 16, in turn."""
    return max(
        float(many["read_bytes"] / many["GB_per_s"] / (few["read_bytes"] / few["GB_per_s"]))
        for few, many in zip(rows[0::2], rows[1::2], strict=True)
    )


def of_one(name: str, rows: list[Row]) -> Iterator[tuple[str, float, list[Row]]]:
    """The targets for one token: name, least ratio, and the rows that should reach it."""
    few = [row for row in rows if row["tokens"] == 1]
    if name == "sparse_ffn":
        yield "sparse_ffn_8_kib", 0.8, few[:1]
        few = few[1:]
    yield name, 0.9, few[1:] if name in ("encodings", "slabs") else few  # the first is plain bfloat16


def targets_of(measured: dict[str, list[Row]]) -> list[Target]:
    targets = [
        Target(
            f"{kernel}_over_memory_bandwidth_ratio", min(row["over_memory_ratio"] for row in few), "x", least, "higher"
        )
        for name, rows in measured.items()
        for kernel, least, few in of_one(name, rows)
    ]
    for name in ("sparse_ffn", "linear"):
        if name in measured:
            targets.append(Target(f"{name}_16_rows_over_1_time_ratio", slowdown(measured[name]), "x", 2.0, "lower"))
    return targets


def main() -> int:
    parser = FlagParser(__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what is measured")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    arena = Arena(options.threads)
    machine = machine_facts(Path()) | {
        "threads": options.threads,
        "cache_bytes": last_level_cache_bytes(),
        "instruction_set": Linear(arena.workers, "BF16").instruction_set,
    }
    measured = {name: rows(arena, options.rounds) for name, rows in ROWS.items() if name in options.rows}
    report(machine, list(itertools.chain(*measured.values())), targets_of(measured), options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
