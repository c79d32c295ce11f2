#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""The tables of "LLM in a flash" (arXiv 2312.11514), row by row, on this machine's own device.

Makes a planted model of the shape (make_planted_model: for speed, not quality), imports it, and runs each row with its
own weightd and client: naive, hybrid, +predictor, +windowing, +bundling, and everything. All decode the same random
token ids. The page cache is not used (O_DIRECT), and the daemon's DRAM is half of the model. The same run measures
fio's sequential read, the model in transformers wholly in memory, and the model offloaded to disk by accelerate within
the memory that weightd and client take together. What is compared is measured twice, in ABBA order.

--dtype int8 int4 imports the model quantised, too, resident matrices as well, and runs the row "all" on it with half
and with a quarter of the memory of 16 bit, to compare it with the row "all" of 16 bit at half.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from flags import FlagParser

import flashclient  # isort: skip  # noqa: F401 - before torch, so that torch's idle threads do not spin
import torch
from bench_import import make_cold
from bench_kernels import Arena, sparse_row
from bench_reader import Case, read_fio
from benchmarks.cgroup import capped_memory
from benchmarks.processes import BenchError, module_command, run_json
from benchmarks.report import Row, Target, machine_facts, report
from paper.figure import draw
from paper.rows import ROWS, RowPlan, Work, costs, run_row, summary
from paper.table import tables
from planted.plan import SHAPES
from planted.store import planted_store

from weightd.store.store import Store

SEQUENTIAL = Case("sequential", 1 << 20, 8, False)
FIO_SECONDS = 4.0
SEED = 7
PEER_TOKENS = {"dense": 24, "accelerate": 4}
ALL = "all"
COMPARED = ("naive", ALL)
QUARTER = ", a quarter"
FASTER = {"int8": 1.8, "int4": 2.5}  # than 16 bit with the same memory


@dataclass(frozen=True)
class Bench:
    """What is measured."""

    work: Work
    sequential: list[float]  # GB/s of fio, so far
    quantised: dict[str, Work]  # by dtype

    def read_sequentially(self) -> None:
        bundles = Store.open(self.work.store, readonly=True).bundles_path(self.work.model)
        self.sequential.append(read_fio(bundles, SEQUENTIAL, FIO_SECONDS).gb_per_s)

    def row(self, plan: RowPlan) -> Row:
        return summary(plan.name, run_row(plan, self.work))

    def quantised_rows(self) -> list[Row]:
        """Of each dtype, with half and with a quarter of the memory of 16 bit."""
        (plan,) = [plan for plan in ROWS if plan.name == ALL]
        quarter = replace(plan, memory="quarter")
        rows = []
        for dtype, work in self.quantised.items():
            rows.append(told(summary(quantised_name(dtype), run_row(plan, work))))
            rows.append(told(summary(quantised_name(dtype) + QUARTER, run_row(quarter, work))))
        return rows

    def peer(self, kind: str, memory_bytes: int) -> Row:
        """A peer; "accelerate" within a cgroup of `memory_bytes`.

        The checkpoint's pages are dropped first: pages that others cached are not charged to the cgroup.
        """
        make_cold(self.work.checkpoint)
        numbers = [self.work.prompt_tokens, PEER_TOKENS[kind], self.work.seed, memory_bytes]
        command = [*module_command("paper.peers"), kind, str(self.work.checkpoint), *map(str, numbers)]
        with ExitStack() as opened:
            if kind == "accelerate":
                command = [*opened.enter_context(capped_memory(memory_bytes)).prefix, *command]
            seconds = run_json(command, kind)
        tokens = [{"seconds": one} for one in seconds]
        told = {key: value for key, value in costs(tokens[1:]).items() if key.startswith("total_ms")}
        return {"row": kind, "tokens": len(tokens) - 1, "prompt_s": seconds[0]} | told


def main() -> int:
    options = _options()
    try:
        machine, rows, targets = measure(options)
    except (BenchError, OSError) as error:
        print(f"bench_paper: {error}", file=sys.stderr)
        return 1
    report(machine, rows, targets, options.json)
    if not options.json:
        print(f"\n{tables(rows)}")
    if options.figures is not None:
        draw({"rows": rows}, f"{options.shape}, {machine['cpu']}", options.figures / f"paper-{options.shape}")
    return 0


def measure(options: argparse.Namespace) -> tuple[Row, list[Row], list[Target]]:
    """Machine, rows and targets."""
    bench = prepare(options)
    machine = machine_facts(options.folder) | {"shape": options.shape, "threads": torch.get_num_threads()}
    machine["model_gb"] = bench.work.model_bytes / 1e9
    plans = [plan for plan in ROWS if plan.name in options.rows]
    bench.read_sequentially()
    rows = [told(bench.row(plan)) for plan in plans]
    rows += bench.quantised_rows()
    peers = [] if options.no_peers else list(PEER_TOKENS)
    memory_bytes = round(max(row["all_memory_gb"] for row in rows if row["dram_gb"]) * 1e9)
    rows += [told(bench.peer(kind, memory_bytes)) for kind in peers]
    again = [told(bench.peer(kind, memory_bytes)) for kind in reversed(peers)]
    again += bench.quantised_rows()[::-1]
    again += [told(bench.row(plan)) for plan in reversed(plans) if plan.name in COMPARED]
    bench.read_sequentially()
    kernel = sparse_row(Arena(torch.get_num_threads()), SHAPES[options.shape].hidden_size, gated_of(options.shape))
    facts: list[Row] = [{"fio_sequential_gb_per_s": fmean(bench.sequential)}, kernel]
    return machine, rows + facts, targets_of([*rows, *again], facts)


def gated_of(shape: str) -> bool:
    return SHAPES[shape].family != "opt"


def told(row: Row) -> Row:
    """Reports on a terminal that a row is done."""
    if sys.stderr.isatty():
        print(f"{row['row']}: {row['total_ms']:.0f} ms per token", file=sys.stderr)
    return row


def prepare(options: argparse.Namespace) -> Bench:
    numbers = options.prompt_tokens, options.tokens, options.dense_tokens, SEED

    def work_of(encoding: str | None = None, whole_bytes: int | None = None) -> Work:
        planted = planted_store(options.shape, options.folder, options.layers, encoding=encoding)
        return Work(planted.checkpoint, planted.store, planted.name, *numbers, whole_bytes=whole_bytes)

    work = work_of()
    quantised = {dtype: work_of(dtype, work.model_bytes) for dtype in options.dtype}
    return Bench(work, [], quantised)


def quantised_name(dtype: str) -> str:
    """Of the row "all" on a quantised model."""
    return f"{ALL}, {dtype}"


def targets_of(rows: Sequence[Row], facts: Sequence[Row]) -> list[Target]:
    """The targets for which both values were measured."""

    def mean(name: str, column: str) -> float | None:
        found = [row[column] for row in rows if row["row"] == name and column in row]
        return fmean(found) if found else None

    fio_gb_per_s, kernel = facts[0]["fio_sequential_gb_per_s"], facts[1]["over_memory_ratio"]
    naive_io, all_io, all_total = mean("naive", "io_ms"), mean("all", "io_ms"), mean("all", "total_ms")
    naive_speed, dense, accelerate = (
        mean("naive", "gb_per_s"),
        mean("dense", "total_ms"),
        mean("accelerate", "total_ms"),
    )
    found: list[tuple[str, float | None, float | None, float]] = [
        ("io_naive_over_all_ratio", naive_io, all_io, 25),
        ("naive_over_fio_sequential_ratio", naive_speed, fio_gb_per_s, 0.9),
        ("decode_over_dense_in_memory_ratio", dense, all_total, 2),
        ("decode_over_accelerate_ratio", accelerate, all_total, 15),
        ("kernel_over_memory_bandwidth_ratio", kernel, 1.0, 0.8),
    ]
    for dtype, aim in FASTER.items():
        whole = mean(ALL, "total_ms")
        found.append((f"{dtype}_over_16_bit_ratio", whole, mean(quantised_name(dtype), "total_ms"), aim))
        quarter = mean(quantised_name(dtype) + QUARTER, "total_ms")
        found.append((f"{dtype}_with_a_quarter_over_16_bit_with_half_ratio", whole, quarter, 1.0))
    targets = [Target(name, over / under, "x", aim, "higher") for name, over, under, aim in found if over and under]
    if (planned := mean("all", "as_planned_share")) is not None:
        targets.append(Target("layers_as_planned_share", planned, "", 1.0, "higher"))
    overhead = mean("all", "overhead_share")
    return targets + ([] if overhead is None else [Target("overhead_share", overhead, "", 0.05, "lower")])


def _options() -> argparse.Namespace:
    names = [plan.name for plan in ROWS]
    parser = FlagParser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="opt-1.3b")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench"), help="on the device to measure; its contents are kept"
    )
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--dtype", nargs="+", choices=FASTER, default=[], help="also of a quantised model, and compare")
    parser.add_argument("--layers", type=int, help="of the model, if not those of the shape")
    parser.add_argument("--tokens", type=int, default=256, help="tokens to decode after the prompt")
    parser.add_argument(
        "--dense-tokens", type=int, default=8, help="tokens of rows that read all neurons for each token"
    )
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--no-peers", action="store_true", help="do not run transformers and accelerate")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw the tables there as PNG and SVG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
