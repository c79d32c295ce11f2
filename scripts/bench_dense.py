#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Measures exact mode of a dense model (SwiGLU, random weights) that does not fit into memory, against the bound.

A token of a dense model needs all weights but the input embedding, of which it needs a row. What of them does not fit
into --dram must be read for each token, at best at the device's sequential speed: that is the bound. fio measures the
device before and after each run of weightd and a client; if the run itself read faster, the bound takes that. The
report says where every byte of --dram is.

llama.cpp (llama-cpp-python, built for this processor) maps the same weights as a GGUF file into memory, from a cold
page cache, once for each readahead of the device that is given; the fastest counts. It has the same memory as weightd
and its client together, in a cgroup: --dram, and 700 MiB for everything that is no weight. --memory is that of the
cgroup; without it, --dram is half of the model. neurostream (from the package index) has that cgroup, too. It keeps
--dram bytes of weights in memory, and reads the rest in blocks of rows; the fastest of two sizes counts. It knows
Qwen3's architecture, which is Llama's with two norms more, so its file has the same weights. Shapes with q4_k have no
such file. The files of Llama 1.3B's shape take 10.8 GB; 5.4 GB without peers.
Shapes with q4_k have all matrices in Q4_K, in one GGUF file that both read; 7 to 8 billion weights take 10 GB.
llama.cpp's repacking of quantised weights is off, because repacked weights are copies that do not fit into memory.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from flags import FlagParser, size_given

import flashclient  # isort: skip  # noqa: F401 - before torch, so that torch's idle threads do not spin
import torch
from bench_paper import FIO_SECONDS, SEED, SEQUENTIAL, told
from bench_reader import read_fio
from benchmarks.cgroup import capped_memory
from benchmarks.forced_tokens import random_ids
from benchmarks.llama import LlamaTask, add_flags, decode_llama, llama_python
from benchmarks.neurostream_task import NeurostreamTask, decode_neurostream
from benchmarks.processes import BenchError
from benchmarks.report import Row, Target, machine_facts, report
from paper.peers import BESIDE_WEIGHTS_BYTES
from paper.rows import COLD, RowPlan, Work, costs, run_row
from planted.dense import EMBEDDING, bytes_of, dense_config
from planted.plan import SHAPES
from planted.quantised_dense import QUANTISED, quantised_store
from planted.shapes import checkpoint_shapes
from planted.shards import write_json
from planted.store import PlantedStore, cut, dense_gguf, dense_store

from weightd.store.store import Store

EXACT = RowPlan("exact", dense=True, flags=COLD, options={"mode": "exact"})
OVER_BOUND_TARGET = 1.15
READ_TARGET = 1.05
LLAMA = "llama.cpp"
NEUROSTREAM = "neurostream"
PEERS = {LLAMA: "exact_over_llama_cpp_ratio", NEUROSTREAM: "exact_over_neurostream_ratio"}  # and the target's name
OVER_PEER_TARGET = 1.0
PEER_TOKENS = 5  # at most: each reads nearly all of the model
BLOCK_ROWS = (1024, 8192)  # neurostream's default, and whole matrices
DENSE_SHAPES = (*(name for name, shape in SHAPES.items() if shape.family == "llama"), *QUANTISED)


@dataclass(frozen=True)
class GivenMemory(Work):
    """The work, with `memory_bytes` for all processes, or half of the model for weights."""

    memory_bytes: int | None

    def dram_bytes(self, memory: str) -> int:
        if self.memory_bytes is None:
            return super().dram_bytes(memory)
        return max(self.memory_bytes - BESIDE_WEIGHTS_BYTES, super().dram_bytes("sweep"))


def main() -> int:
    options = _options()
    try:
        machine, rows, targets = measure(options)
    except (BenchError, OSError) as error:
        print(f"bench_dense: {error}", file=sys.stderr)
        return 1
    report(machine, rows, targets, options.json)
    return 0


def measure(options: argparse.Namespace) -> tuple[Row, list[Row], list[Target]]:
    """Machine, rows and targets."""
    dense, needed_bytes, vocabulary = prepare(options)
    numbers = options.prompt_tokens, 1, options.tokens, SEED
    work = GivenMemory(dense.checkpoint, dense.store, dense.name, *numbers, options.memory)
    machine = machine_facts(options.folder) | {"shape": options.shape, "threads": torch.get_num_threads()}
    bundles = Store.open(work.store, readonly=True).bundles_path(work.model)
    memory_bytes = work.dram_bytes(EXACT.memory) + BESIDE_WEIGHTS_BYTES
    peer = None if options.no_peers else llama_task(options, dense, work, vocabulary)
    streamer = None if peer is None else neurostream_task(options, dense, peer)

    def fio() -> float:
        return read_fio(bundles, SEQUENTIAL, FIO_SECONDS).gb_per_s

    rows = []
    for _ in range(options.runs):
        before = fio()
        with capped_memory(memory_bytes) if peer is not None else nullcontext() as cgroup:
            costs_of_run = run_row(EXACT, work, () if cgroup is None else cgroup.prefix)
            peak = {} if cgroup is None else {"memory_gb": memory_bytes / 1e9, "peak_gb": cgroup.peak_bytes / 1e9}
        rows.append(told(row_of(costs_of_run, needed_bytes, (before + fio()) / 2) | peak))
        if peer is not None:
            for kib in options.readahead_kib:
                rows.append(told(peer_row(LLAMA, decode_llama(peer, memory_bytes, kib)) | {"readahead_kib": kib}))
        if streamer is not None:
            for block_rows in BLOCK_ROWS:
                decoded = decode_neurostream(streamer, memory_bytes, work.dram_bytes(EXACT.memory), block_rows)
                rows.append(told(peer_row(NEUROSTREAM, decoded) | {"block_rows": block_rows}))
    return machine, rows, targets_of(rows)


def prepare(options: argparse.Namespace) -> tuple[PlantedStore, int, int]:
    """The model, the bytes of the weights that a token needs, and the vocabulary. Makes files that are missing."""
    if options.shape in QUANTISED:
        quantised = QUANTISED[options.shape]
        return quantised_store(options.shape, options.folder), quantised.needed_bytes, quantised.vocabulary
    dense, (shape, _) = dense_store(options.shape, options.folder, options.layers), cut(options.shape, options.layers)
    sizes = checkpoint_shapes(dense_config(shape))
    return dense, bytes_of(size for name, size in sizes.items() if name != EMBEDDING), shape.vocabulary


def llama_task(options: argparse.Namespace, stored: PlantedStore, work: Work, vocabulary: int) -> LlamaTask:
    """The same tokens for llama.cpp. Makes its file and environment if they are missing."""
    python = llama_python(options.llama_cpp)
    is_gguf = not stored.checkpoint.is_dir()
    gguf = stored.checkpoint if is_gguf else dense_gguf(stored, options.shape, options.layers)
    plan = gguf.with_name("ids.json")
    new_tokens = min(work.dense_tokens, PEER_TOKENS)
    parts = (work.prompt_tokens, work.seed), (new_tokens, work.seed + 1)
    write_json(plan, {"ids": [one for count, seed in parts for one in random_ids(vocabulary, count, seed)]})
    return LlamaTask(python, gguf, plan, work.prompt_tokens, new_tokens, torch.get_num_threads())


def neurostream_task(options: argparse.Namespace, stored: PlantedStore, peer: LlamaTask) -> NeurostreamTask | None:
    """The same tokens for neurostream. Makes its file if it is missing. None: it has no file of the shape."""
    if options.shape in QUANTISED:
        return None
    gguf = dense_gguf(stored, options.shape, options.layers, as_qwen3=True)
    return NeurostreamTask(gguf, peer.plan, peer.prompt_tokens, peer.new_tokens)


def peer_row(name: str, told: dict[str, Any]) -> Row:
    """Medians over the tokens after the prompt."""
    seconds, read_bytes = told["seconds"][1:], told["read_bytes"][1:]
    return {
        "row": name,
        "tokens": len(seconds),
        "memory_gb": told["memory_bytes"] / 1e9,
        "read_gb_per_token": median(read_bytes) / 1e9,
        "total_ms": fmean(seconds) * 1e3,
        "total_ms_p50": median(seconds) * 1e3,
        "prompt_s": told["seconds"][0],
    }


def row_of(told: dict[str, Any], needed_bytes: int, device_gb_per_s: float) -> Row:
    """The costs of a token beside the bound, and the parts of --dram.

    Args:
        told: the client's output (paper/client.py).
        needed_bytes: the weights that a token needs.
        device_gb_per_s: by fio.
    """
    tokens = told["tokens"][1:]  # the first is the prompt
    row: Row = {"row": EXACT.name, "tokens": len(tokens), "dram_gb": told["dram_bytes"] / 1e9}
    row |= {f"{part}_gb": size_bytes / 1e9 for part, size_bytes in told["dram"].items()}
    row |= costs(tokens)
    missing_gb = max(0, needed_bytes - told["dram_bytes"]) / 1e9  # a tiny model needs more memory than its weights
    row |= {"missing_gb": missing_gb, "device_gb_per_s": max(device_gb_per_s, row["gb_per_s"])}
    if missing_gb > 0:
        row["over_bound_ratio"] = row["total_ms_p50"] / 1e3 / (missing_gb / row["device_gb_per_s"])
        row["read_over_missing_ratio"] = row["read_gb_per_token"] / missing_gb
    return row


def targets_of(rows: Sequence[Row]) -> list[Target]:
    """A token's time and bytes against the bound, and its speed against that of peers: medians of all runs."""
    ours = [row for row in rows if row["row"] == EXACT.name]
    targets = [
        Target(f"exact_{name}", median(row[name] for row in ours), "x", aim, "lower")
        for name, aim in (("over_bound_ratio", OVER_BOUND_TARGET), ("read_over_missing_ratio", READ_TARGET))
        if name in ours[0]
    ]
    for peer, target in PEERS.items():
        settings = defaultdict(list)  # medians of a token's time, by what was tried
        for row in rows:
            if row["row"] == peer:
                settings[row.get("readahead_kib"), row.get("block_rows")].append(row["total_ms_p50"])
        if settings and targets:
            best_ms = min(median(times) for times in settings.values())
            faster = best_ms / median(row["total_ms_p50"] for row in ours)
            targets.append(Target(target, faster, "x", OVER_PEER_TARGET, "higher"))
    return targets


def _options() -> argparse.Namespace:
    parser = FlagParser(__doc__)
    parser.add_argument("--shape", choices=DENSE_SHAPES, default="llama-1.3b")
    parser.add_argument("--layers", type=int, help="of the model, fewer than the shape has")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench"), help="on the device to measure; its contents are kept"
    )
    parser.add_argument("--memory", type=size_given, help="of all processes, such as 5GB (default: half of the model)")
    parser.add_argument("--tokens", type=int, default=12, help="tokens to decode after the prompt")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=4, help="runs of weightd and a client, with fio between them")
    parser.add_argument("--no-peers", action="store_true", help="do not run llama.cpp and neurostream")
    add_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
