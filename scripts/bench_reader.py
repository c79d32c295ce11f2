#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Compares the native reader with fio: the same file, sizes and depth, in one run in ABBA order.

Prints speed and CPU time per read of both engines, with and without checksums. fio uses its fastest settings: io_uring,
a registered file, registered buffers, and few clock readings.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from tempfile import NamedTemporaryFile

from benchmarks.report import Row, Target, abba, machine_facts, middle, report
from flags import FlagParser

from weightd._native import measure_reads
from weightd.sizes import format_size, parse_size
from weightd.store.device_profile import write_sample

ENGINES = ("io_uring", "threads")
RATIO_TARGET = 0.95
FILE_BYTES_MIN = 1 << 30  # smaller ones may lie in a device's or hypervisor's cache


@dataclass(frozen=True)
class Case:
    """One way of reading."""

    name: str
    read_bytes: int
    depth: int
    random: bool


CASES = (
    Case("random_16k", 16 << 10, 32, True),
    Case("random_32k", 32 << 10, 32, True),
    Case("random_128k", 128 << 10, 32, True),
    Case("sequential_1m", 1 << 20, 8, False),
)


@dataclass(frozen=True)
class Speed:
    """One run."""

    gb_per_s: float
    cpu_us_per_read: float


def main() -> int:
    options = _options()
    if shutil.which("fio") is None:
        sys.exit("bench_reader: fio is not installed; apt-get install fio")
    size_bytes = parse_size(options.size)
    if size_bytes < FILE_BYTES_MIN:
        sys.exit(f"bench_reader: --size {options.size} is less than {format_size(FILE_BYTES_MIN)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    targets: list[Target] = []
    with NamedTemporaryFile(dir=options.folder, prefix=".bench-") as file:
        machine = machine_facts(options.folder)
        write_sample(file.fileno(), size_bytes)
        for case in CASES:
            for engine in ENGINES:
                row = compare(Path(file.name), case, engine, options.seconds, options.rounds)
                rows.append(row)
                targets.append(Target(f"{case.name}_{engine}_ratio", row["ratio"], "", RATIO_TARGET, "higher"))
    report(machine, rows, targets, options.json)
    return 0


def compare(path: Path, case: Case, engine: str, seconds: float, rounds: int) -> Row:
    """The medians of both, and of the native reader with checksums."""
    ours = partial(read_ours, path, case, engine, seconds, False)
    ours_runs, fio_runs = abba(ours, partial(read_fio, path, case, seconds), rounds)
    verified = [read_ours(path, case, engine, seconds, True) for _ in range(rounds)]
    speed, cpu = attrgetter("gb_per_s"), attrgetter("cpu_us_per_read")
    return {
        "case": case.name,
        "engine": engine,
        "depth": case.depth,
        "gb_per_s": middle(ours_runs, speed),
        "fio_gb_per_s": middle(fio_runs, speed),
        "ratio": middle(ours_runs, speed) / middle(fio_runs, speed),
        "cpu_us_per_read": middle(ours_runs, cpu),
        "fio_cpu_us_per_read": middle(fio_runs, cpu),
        "verified_gb_per_s": middle(verified, speed),
        "verified_cpu_us_per_read": middle(verified, cpu),
    }


def read_ours(path: Path, case: Case, engine: str, seconds: float, verify: bool) -> Speed:
    """The native reader, as weightd uses it."""
    done = measure_reads(str(path), case.read_bytes, case.depth, seconds, case.random, engine, verify)
    return Speed(done["bytes"] / done["seconds"] / 1e9, done["cpu_seconds"] / done["reads"] * 1e6)


def read_fio(path: Path, case: Case, seconds: float) -> Speed:
    """fio with its fastest settings."""
    command = ["fio", "--name=read", f"--filename={path}", f"--bs={case.read_bytes}", f"--iodepth={case.depth}"]
    command += ["--rw=randread" if case.random else "--rw=read", "--norandommap", "--ioengine=io_uring"]
    command += ["--fixedbufs", "--registerfiles", "--gtod_reduce=1", "--direct=1"]
    command += [f"--runtime={seconds:g}", "--time_based", "--output-format=json", "--allow_file_create=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"bench_reader: fio failed: {done.stderr.strip()}")
    job = json.loads(done.stdout)["jobs"][0]
    reads, run_s = job["read"]["total_ios"], job["job_runtime"] / 1e3
    cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * run_s
    return Speed(job["read"]["bw_bytes"] / 1e9, cpu_s / reads * 1e6)


def _options() -> argparse.Namespace:
    parser = FlagParser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="on the device to measure")
    parser.add_argument("--size", default="2GiB", help="size of the file that is written, read and deleted")
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of a run")
    parser.add_argument("--rounds", type=int, default=4, help="number of ABBA rounds")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
