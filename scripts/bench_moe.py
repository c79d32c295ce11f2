#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Decodes with a mixture of experts in all, half and a quarter of its memory, beside llama.cpp and the device's bound.

Makes a planted mixture (planted/mixture.py: for speed, not quality), imports it, and decodes one sequence of forced
tokens. The routers choose experts so that an LRU list which holds 50, 25 and 12.5 % of them hits 89, 67 and 45 %. Each
row runs in a memory cgroup: that share of the model's bytes, and 700 MiB for everything that is no weight. llama.cpp
(llama-cpp-python, built for this processor) maps the same weights as a GGUF file into memory, in a cgroup of the same
size and from a cold page cache, once for each readahead of the device that is given; its repacking of quantised
weights is off, because repacked weights are copies that fill the memory. accelerate offloads the same
checkpoint to disk, within the same memory; it decodes 4 tokens.

A token cannot take less than its bound: the bytes of experts that it needs and that are not in the pool, at the speed
of the device, or the bytes of all weights that it needs, at the speed of memory, whichever takes longer. A run has one
speed of the device: that of fio, or of the row in which weightd read fastest, whichever is higher. The files of
OLMoE-1B-7B's shape take 42 GB; 28 GB without llama.cpp. Those of qwen3-30b-a3b-q4_k (Qwen3's architecture, all matrices
in Q4_K, one GGUF file for both) take 35 GB. gpt-oss-20b-mxfp4 has the sizes of gpt-oss-20b in Qwen3's architecture,
experts in MXFP4 and all else in F16: 28 GB.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from flags import FlagParser

import flashclient  # isort: skip  # noqa: F401 - before torch, so that torch's idle threads do not spin
import torch
from bench_kernels import Arena
from bench_paper import SEQUENTIAL
from bench_reader import Case, read_fio
from benchmarks.llama import add_flags, llama_python
from benchmarks.processes import BenchError
from benchmarks.report import Row, Target, machine_facts, report
from moe.files import mixture_files
from moe.rows import LLAMA, MEMORY, OURS, ROWS, Work, memory_given, rows_of
from planted.mixture import MIXTURES

from weightd.store.store import Store

FIO_SECONDS = 3.0
MEMORY_READS = 5
READS_IN_FLIGHT = 32  # of cells at random; the device is read sequentially, too, and the faster counts
OVER_BOUND_TARGET = 1.3
OVER_LLAMA_TARGET = 2.0


@dataclass
class Speeds:
    """The speeds of device and memory in GB/s, measured several times."""

    work: Work
    device: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def measure(self) -> None:
        files = self.work.files
        bundles = Store.open(files.store, readonly=True).bundles_path(files.name)
        experts = Case("experts", self.work.files.record.bundle.cell_bytes, READS_IN_FLIGHT, True)
        self.device.append(max(read_fio(bundles, case, FIO_SECONDS).gb_per_s for case in (SEQUENTIAL, experts)))
        arena = Arena(self.work.threads)
        self.memory += [arena.bytes / arena.read_s() / 1e9 for _ in range(MEMORY_READS)]

    def facts(self, ours: Sequence[Row]) -> Row:
        """The speeds of the run."""
        # weightd may read faster than fio: what was read lately may lie in a cache of the host.
        device = max(fmean(self.device), *(row["gb_per_s"] for row in ours)) if ours else fmean(self.device)
        return {
            "device_gb_per_s": device,
            "fio_gb_per_s": fmean(self.device),
            "memory_gb_per_s": fmean(self.memory),
        }


def set_bound(row: Row, speeds: Row, touched_bytes: int) -> None:
    """Adds the least time of a token to a row of weightd, and how many times as long its tokens took."""
    missing_ms = row["missing_gb_per_token"] / speeds["device_gb_per_s"] * 1e3
    row["bound_ms"] = max(missing_ms, touched_bytes / 1e6 / speeds["memory_gb_per_s"])
    row["over_bound_ratio"] = row["total_ms"] / row["bound_ms"]


def main() -> int:
    options = _options()
    try:
        machine, rows, targets = measure(options)
    except (BenchError, OSError) as error:
        print(f"bench_moe: {error}", file=sys.stderr)
        return 1
    report(machine, rows, targets, options.json)
    return 0


def measure(options: argparse.Namespace) -> tuple[Row, list[Row], list[Target]]:
    """Machine, rows and targets."""
    files = mixture_files(options.shape, options.layers, options.folder)
    numbers = options.prompt_tokens, options.first_tokens, options.tokens
    if sum(numbers) > files.shape.tokens_max:
        raise BenchError(f"{options.shape} knows {files.shape.tokens_max} tokens: give fewer --tokens")
    files.planted()
    files.imported()
    python = None
    if LLAMA in options.rows:
        python = llama_python(options.llama_cpp)
        files.converted()
    work = Work(files, *numbers, torch.get_num_threads())
    speeds = Speeds(work)
    rows: list[Row] = []
    for memory in options.memory:
        speeds.measure()
        rows += rows_of(work, memory, options.rows, python, options.readahead_kib)
    speeds.measure()
    ours = [row for row in rows if row["row"] in OURS.values()]
    facts = speeds.facts(ours)
    for row in ours:
        set_bound(row, facts, work.touched_bytes)
    machine = machine_facts(options.folder) | {"shape": options.shape, "layers": files.shape.layers}
    machine |= {"threads": work.threads, "model_gb": files.model_bytes / 1e9}
    machine |= {"guess_precision": fmean(files.plan["guess_precision"])}
    return machine, [facts, *rows], targets_of(rows)


def targets_of(rows: Sequence[Row]) -> list[Target]:
    """The targets for which values were measured.

    Several rows of weightd count by their mean, those of llama.cpp by the fastest.
    """
    targets = []
    for memory in dict.fromkeys(row["memory"] for row in rows if row["memory"] != "all"):
        ours = [row for row in rows if (row["row"], row["memory"]) == (OURS[True], memory)]
        peer = [row["tokens_per_s"] for row in rows if (row["row"], row["memory"]) == (LLAMA, memory)]
        if ours:
            over_bound = fmean(row["over_bound_ratio"] for row in ours)
            targets.append(Target(f"token_over_bound_ratio_{memory}", over_bound, "x", OVER_BOUND_TARGET, "lower"))
        if ours and peer:
            faster = fmean(row["tokens_per_s"] for row in ours) / max(peer)
            targets.append(Target(f"over_llama_cpp_ratio_{memory}", faster, "x", OVER_LLAMA_TARGET, "higher"))
    return targets


def _options() -> argparse.Namespace:
    parser = FlagParser(__doc__)
    parser.add_argument("--shape", choices=MIXTURES, default="olmoe-1b-7b")
    parser.add_argument("--layers", type=int, help="of the model, fewer than the shape has")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench"), help="on the device to measure; its contents are kept"
    )
    parser.add_argument(
        "--memory", nargs="+", default=list(MEMORY), type=memory_given, help="shares of the model, or all of it: 10GB"
    )
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--first-tokens", type=int, default=48, help="tokens after the prompt that are not measured")
    parser.add_argument("--tokens", type=int, default=96, help="tokens that are measured")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what is measured")
    add_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
