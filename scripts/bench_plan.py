#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Compares what `weightd plan` expects of a token with what it takes: planted models, on this machine's own device.

Each case makes a model of a published width with few layers, imports it, and decodes forced tokens. Models in exact
mode are planned from their config.json alone, one in predict mode from its calibration. The device is measured directly
before and after the tokens. Files take two gigabytes at a time, and are deleted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

from benchmarks.processes import BenchError, Daemon, module_command, run_json, serving
from benchmarks.report import Row, Target, machine_facts, report
from flags import FlagParser

import flashclient  # isort: skip  # noqa: F401 - before torch, so that torch's idle threads do not spin
from paper.client import Task
from planted.store import PlantedStore, dense_store, planted_store

from weightd.importing.client_process import child
from weightd.planning.expectation import Expectation, expect
from weightd.planning.firing import Firing, calibrated_firing
from weightd.planning.subject import Subject, subject_of
from weightd.serving.served_models import demand_of
from weightd.store.device_profile import DeviceProfile, measure
from weightd.store.store import Store

RATIO_MOST, RATIO_LEAST = 1.2, 0.8
PROMPT_TOKENS = 16
SEED = 7
FLAGS = ("--cold-start", "--dram-floor", "100%")  # of weightd: no hotness of another run, and all of its --dram


@dataclass(frozen=True)
class Case:
    """What is planned and measured.

    Attributes:
        shape, layers: of the planted model.
        pool_share: of the cells, in the pool.
        first_tokens: in which the pool fills.
        window: of predict mode; None: exact mode.
    """

    name: str
    shape: str
    layers: int
    pool_share: float
    first_tokens: int
    tokens: int
    window: int | None = None


CASES = (
    Case("llama_exact_half", "llama-1.3b", 6, 0.5, 4, 24),
    Case("llama_exact_quarter", "llama-1.3b", 6, 0.25, 4, 24),
    Case("opt_predict_half", "opt-1.3b", 6, 0.25, 50, 150, window=4),
)


def main() -> int:
    options = _options()
    try:
        rows = [row for case in CASES if case.name in options.cases for row in rows_of(case, options)]
    except (BenchError, OSError) as error:
        print(f"bench_plan: {error}", file=sys.stderr)
        return 1
    report(machine_facts(options.folder), rows, targets_of(rows), options.json)
    return 0


def rows_of(case: Case, options: argparse.Namespace) -> list[Row]:
    with planted(case, options.folder) as files:
        return [row_of(case, files) for _ in range(options.rounds)]


@contextmanager
def planted(case: Case, folder: Path) -> Iterator[PlantedStore]:
    """The files of the case's model, which are deleted at the end."""
    make = dense_store if case.window is None else planted_store
    files = make(case.shape, folder, case.layers)
    try:
        yield files
    finally:
        shutil.rmtree(files.checkpoint)
        shutil.rmtree(files.store)


def row_of(case: Case, files: PlantedStore) -> Row:
    before = measure(files.store)
    subject, firing = planned(case, files, before)
    record = subject.record
    dram_bytes = demand_of(record).minimum_bytes + int(case.pool_share * record.bundles_file_bytes)
    with serving(files.store, dram_bytes, FLAGS) as daemon:
        told = run_json(client_command(case, files, daemon), case.name)
    tokens = told["tokens"][1 + case.first_tokens :]
    expected = [expect(record, subject.cost, device, dram_bytes, firing) for device in (before, measure(files.store))]
    return {"row": case.name, "dram_gb": dram_bytes / 1e9} | compared(expected, tokens)


def planned(case: Case, files: PlantedStore, device: DeviceProfile) -> tuple[Subject, Firing | None]:
    with child() as ask:
        if case.window is None:
            return subject_of(str(files.checkpoint / "config.json"), None, None, device, None, ask), None
        subject = subject_of(files.name, None, None, device, files.store, ask)
    with Store.open(files.store, readonly=True) as store:
        return subject, calibrated_firing(store, subject.record, case.window)


def client_command(case: Case, files: PlantedStore, daemon: Daemon) -> list[str]:
    """The command of the process that decodes. It prints what each token cost, the first after the prompt."""
    new_tokens = 1 + case.first_tokens + case.tokens
    options = {"mode": "exact"} if case.window is None else {"mode": "predict", "window": case.window}
    task = Task(daemon.address, files.name, daemon.pid, PROMPT_TOKENS, new_tokens, SEED, options)
    return [*module_command("paper.client"), json.dumps(asdict(task))]


def compared(expected: Sequence[Expectation], tokens: Sequence[dict[str, float]]) -> Row:
    """Expected and measured figures. Those that are expected are means of the two with each profile of the device."""

    def mean(name: str) -> float:
        return fmean(getattr(each, name) for each in expected)

    def measured(name: str) -> float:
        return median(token[name] for token in tokens)

    plan_ms, took_ms = mean("token_s") * 1e3, measured("seconds") * 1e3
    requests = sum(token["reads"] for token in tokens)
    return {
        "plan_ms": plan_ms,
        "measured_ms": took_ms,
        "plan_over_measured_ratio": plan_ms / took_ms,
        "plan_read_mb": expected[0].reads.read_bytes / 1e6,
        "measured_read_mb": sum(token["read_bytes"] for token in tokens) / len(tokens) / 1e6,
        "plan_reading_ms": mean("read_s") * 1e3,
        "measured_reading_ms": measured("reading_s") * 1e3,
        "measured_request_kb": sum(token["read_bytes"] for token in tokens) / max(1.0, requests) / 1e3,
        "plan_computing_ms": mean("compute_s") * 1e3,
        "measured_computing_ms": (measured("forward_s") - measured("wait_s")) * 1e3,
        "measured_waiting_ms": measured("wait_s") * 1e3,
    }


def targets_of(rows: Sequence[Row]) -> list[Target]:
    """The worst ratio on each side."""
    if not rows:
        return []
    ratios = [row["plan_over_measured_ratio"] for row in rows]
    return [
        Target("plan_over_measured_ratio", max(ratios), "x", RATIO_MOST, "lower"),
        Target("plan_over_measured_ratio", min(ratios), "x", RATIO_LEAST, "higher"),
    ]


def _options() -> argparse.Namespace:
    parser = FlagParser(__doc__)
    names = [case.name for case in CASES]
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="on the device to measure")
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each case")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
