#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Measures exact mode of a dense model (SwiGLU, random weights) with half of it in memory, against the bound.

A token of a dense model needs all weights but the input embedding, of which it needs a row. What of them does not fit
into --dram must be read for each token, at best at the device's sequential speed: that is the bound. fio measures the
device before and after each run of weightd and a client; if the run itself read faster, the bound takes that. The
report says where every byte of --dram is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from flags import FlagParser

import flashclient  # isort: skip  # noqa: F401 - before torch, so that torch's idle threads do not spin
import torch
from bench_paper import FIO_SECONDS, SEED, SEQUENTIAL, told
from bench_reader import read_fio
from benchmarks.processes import BenchError
from benchmarks.report import Row, Target, machine_facts, report
from paper.rows import COLD, RowPlan, Work, costs, run_row
from planted.dense import EMBEDDING, bytes_of, dense_config
from planted.plan import SHAPES
from planted.shapes import checkpoint_shapes
from planted.store import cut, dense_store

from weightd.store.store import Store

EXACT = RowPlan("exact, half in memory", dense=True, flags=COLD, options={"mode": "exact"})
OVER_BOUND_TARGET = 1.15
READ_TARGET = 1.05
DENSE_SHAPES = tuple(name for name, shape in SHAPES.items() if shape.family == "llama")


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
    dense = dense_store(options.shape, options.folder, options.layers)
    work = Work(dense.checkpoint, dense.store, dense.name, options.prompt_tokens, 1, options.tokens, SEED)
    machine = machine_facts(options.folder) | {"shape": options.shape, "threads": torch.get_num_threads()}
    bundles = Store.open(work.store, readonly=True).bundles_path(work.model)
    sizes = checkpoint_shapes(dense_config(cut(options.shape, options.layers)[0]))
    needed_bytes = bytes_of(size for name, size in sizes.items() if name != EMBEDDING)

    def fio() -> float:
        return read_fio(bundles, SEQUENTIAL, FIO_SECONDS).gb_per_s

    rows = []
    before = fio()
    for _ in range(options.runs):
        costs_of_run = run_row(EXACT, work)
        after = fio()
        rows.append(told(row_of(costs_of_run, needed_bytes, (before + after) / 2)))
        before = after
    return machine, rows, targets_of(rows)


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
    """A token's time and bytes against the bound: medians of all runs."""
    return [
        Target(f"exact_half_{name}", median(row[name] for row in rows), "x", aim, "lower")
        for name, aim in (("over_bound_ratio", OVER_BOUND_TARGET), ("read_over_missing_ratio", READ_TARGET))
        if name in rows[0]
    ]


def _options() -> argparse.Namespace:
    parser = FlagParser(__doc__)
    parser.add_argument("--shape", choices=DENSE_SHAPES, default="llama-1.3b")
    parser.add_argument("--layers", type=int, help="of the model, fewer than the shape has")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench"), help="on the device to measure; its contents are kept"
    )
    parser.add_argument("--tokens", type=int, default=12, help="tokens to decode after the prompt")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=4, help="runs of weightd and a client, with fio between them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
