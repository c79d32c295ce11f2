#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Compares what `weightd plan` expects of a token with what it takes: planted models, on this machine's own device.

Each model has a published width and few layers, is imported, and decodes forced tokens with half and a quarter of its
FFNs in the pool. Models in exact mode are planned from their config.json alone, one in predict mode from its
calibration. Device and kernels are measured directly before and after the tokens. A token's time is the mean over all
tokens, and the ratio of a case the median over its rounds. Files take four gigabytes at a time, and are deleted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

from benchmarks.processes import BenchError, Daemon, module_command, run_json, serving
from benchmarks.report import Row, Target, machine_facts, report
from flags import FlagParser

import flashclient  # isort: skip  # noqa: F401 - before torch, so that torch's idle threads do not spin
from moe.client import Task as MixtureTask
from moe.files import PLAN_FILE, mixture_files
from paper.client import Task
from planted.store import PlantedStore, dense_store, planted_store

from weightd.importing.client_process import Ask, child
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
        model: of MODELS.
        pool_share: of the cells, in the pool.
    """

    name: str
    model: str
    pool_share: float


CASES = tuple(
    Case(f"{model}_{name}", model, share)
    for model in ("exact", "predict", "mixture")
    for name, share in (("half", 0.5), ("quarter", 0.25))
)


class Measured(ABC):
    """A planted model.

    Attributes:
        first_tokens: in which the pool fills.
        window: of predict mode; None: exact mode.
    """

    first_tokens: int
    tokens: int
    window: int | None = None

    @abstractmethod
    def files(self, folder: Path) -> PlantedStore:
        """Makes the files that are missing."""

    def command(self, files: PlantedStore, daemon: Daemon) -> list[str]:
        """The command of the process that decodes. It prints what each token cost, the first after the prompt."""
        new_tokens = 1 + self.first_tokens + self.tokens
        options = {"mode": "exact"} if self.window is None else {"mode": "predict", "window": self.window}
        task = Task(daemon.address, files.name, daemon.pid, PROMPT_TOKENS, new_tokens, SEED, options)
        return [*module_command("paper.client"), json.dumps(asdict(task))]


class Exact(Measured):
    first_tokens, tokens = 4, 24

    def files(self, folder: Path) -> PlantedStore:
        return dense_store("llama-1.3b", folder, 6)


class Predict(Measured):
    first_tokens, tokens, window = 50, 150, 4

    def files(self, folder: Path) -> PlantedStore:
        return planted_store("opt-1.3b", folder, 6)


class Mixture(Measured):
    first_tokens, tokens = 150, 150

    def files(self, folder: Path) -> PlantedStore:
        files = mixture_files("olmoe-1b-7b", 2, folder)
        files.planted()
        files.imported()
        return files

    def command(self, files: PlantedStore, daemon: Daemon) -> list[str]:
        new_tokens = 1 + self.first_tokens + self.tokens
        plan = str(files.checkpoint / PLAN_FILE)
        task = MixtureTask(daemon.address, files.name, daemon.pid, plan, PROMPT_TOKENS, new_tokens, True, False)
        return [*module_command("moe.client"), json.dumps(asdict(task))]


MODELS: dict[str, Measured] = {"exact": Exact(), "predict": Predict(), "mixture": Mixture()}


def main() -> int:
    options = _options()
    rows: list[Row] = []
    try:
        for name, model in MODELS.items():
            if cases := [case for case in CASES if case.model == name and case.name in options.cases]:
                with planted(model, options.folder) as files:
                    rows += [row_of(case, model, files) for _ in range(options.rounds) for case in cases]
    except (BenchError, OSError) as error:
        print(f"bench_plan: {error}", file=sys.stderr)
        return 1
    report(machine_facts(options.folder), rows, targets_of(rows), options.json)
    return 0


@contextmanager
def planted(model: Measured, folder: Path) -> Iterator[PlantedStore]:
    """The model's files, which are deleted at the end."""
    files = model.files(folder)
    try:
        yield files
    finally:
        shutil.rmtree(files.checkpoint)
        shutil.rmtree(files.store)


def row_of(case: Case, model: Measured, files: PlantedStore) -> Row:
    with child() as ask:
        before = planned(model, files, measure(files.store), ask)
        record = before.subject.record
        dram_bytes = demand_of(record).minimum_bytes + int(case.pool_share * record.bundles_file_bytes)
        with serving(files.store, dram_bytes, FLAGS) as daemon:
            told = run_json(model.command(files, daemon), case.name)
        after = planned(model, files, measure(files.store), ask)
    tokens = told["tokens"][1 + model.first_tokens :]
    expected = [expect(p.subject.record, p.subject.cost, p.device, dram_bytes, p.firing) for p in (before, after)]
    return {"row": case.name, "dram_gb": dram_bytes / 1e9} | compared(expected, tokens)


@dataclass(frozen=True)
class Planned:
    """A model with what is known of it and of the machine."""

    subject: Subject
    device: DeviceProfile
    firing: Firing | None


def planned(model: Measured, files: PlantedStore, device: DeviceProfile, ask: Ask) -> Planned:
    if model.window is None:
        return Planned(subject_of(str(files.checkpoint / "config.json"), None, None, device, None, ask), device, None)
    subject = subject_of(files.name, None, None, device, files.store, ask)
    with Store.open(files.store, readonly=True) as store:
        return Planned(subject, device, calibrated_firing(store, subject.record, model.window))


def compared(expected: Sequence[Expectation], tokens: Sequence[dict[str, float]]) -> Row:
    """Expected and measured figures. Those that are expected are means of the two before and after the tokens."""

    def mean(name: str) -> float:
        return fmean(getattr(each, name) for each in expected)

    def measured(name: str) -> float:
        return fmean(token[name] for token in tokens)

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
    """The median ratio of each case, which must be neither too high nor too low."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        ratios[row["row"]].append(row["plan_over_measured_ratio"])
    return [
        target
        for name, values in ratios.items()
        for target in (
            Target(f"plan_over_measured_ratio_{name}", median(values), "x", RATIO_MOST, "lower"),
            Target(f"plan_over_measured_ratio_{name}", median(values), "x", RATIO_LEAST, "higher"),
        )
    ]


def _options() -> argparse.Namespace:
    parser = FlagParser(__doc__)
    names = [case.name for case in CASES]
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="on the device to measure")
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each case")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
