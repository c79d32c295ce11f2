#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Measures several processes that share one model: their memory, their bytes from flash, and their speed.

All processes decode the same tokens after the same prompt at the same time, in exact and in predict mode, with one
weightd that has half of the model's bytes. For comparison, each process gets its own weightd. Memory is the sum of
Pss_Anon and Pss_File of all processes, plus the blocks of memfds counted once. The memory of processes that have loaded
the libraries but no model is measured and listed separately. Numbers of clients are measured upwards, then downwards
(1, 2, 4, 4, 2, 1), and averaged; with --once only upwards.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from flags import FlagParser

import flashclient  # isort: skip  # noqa: F401 - before torch, so that torch's idle threads do not spin
from benchmarks.processes import BenchError, Daemon, module_command, serving
from benchmarks.report import Row, Target, machine_facts, report
from benchmarks.sharing_client import Task
from paper.rows import COLD
from planted.plan import SHAPES
from planted.store import PlantedStore, planted_store

from flashclient.daemon.channel import Connection
from weightd.store.store import CATALOG_FILE
from weightd_proto.files import DAEMON_LOCK_FILE

TIMEOUT_S = 600.0
SEED = 11
BLOCK_BYTES = 512  # of st_blocks
MODES = {"exact": 8, "predict": 64}  # tokens to decode


@dataclass(frozen=True)
class Read:
    """The bytes that the daemons have read from flash for the model, and the filled slots of their pools."""

    read_bytes: int
    slots_filled: int


class Client:
    """A process that decodes on demand. Raises BenchError with its last line of standard error."""

    def __init__(self, task: Task) -> None:
        pipe = subprocess.PIPE
        command = [*module_command("benchmarks.sharing_client"), json.dumps(asdict(task))]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    def told(self) -> Any:
        """The next JSON line that the process prints."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._process.communicate()[1].strip().splitlines() or ["nothing"]
            raise BenchError(f"a client ended: {said[-1]}")
        return json.loads(line)

    def start(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def close(self) -> None:
        self._process.communicate()


@contextmanager
def clients(tasks: Sequence[Task]) -> Iterator[list[Client]]:
    """Processes that are ready, ended at the end."""
    with ExitStack() as opened:
        started = [Client(task) for task in tasks]
        for client in started:
            opened.callback(client.close)
        for client in started:
            client.told()
        yield started


def process_bytes(pid: int, kinds: str = "Anon|File") -> int:
    """Pss_Anon and Pss_File: a process's own memory and its part of mapped files."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.findall(rf"^Pss_(?:{kinds}):\s+(\d+) kB", text, re.MULTILINE)
    return sum(map(int, found)) * 1024


def shared_bytes(pid: int) -> int:
    """Blocks of the memfds that a daemon has open, each counted once."""
    files = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if str(entry.readlink()).startswith("/memfd:"):
                facts = entry.stat()
                files[facts.st_ino] = facts.st_blocks * BLOCK_BYTES
    return sum(files.values())


def runtime_bytes(counts: Sequence[int]) -> dict[int, float]:
    """The memory of that many processes that have loaded the libraries but no model. They share what they map."""
    with clients([Task(None, "", "", 0, 0, 0)] * counts[-1]) as started:
        own, mapped = (sum(process_bytes(client.pid, kind) for client in started) for kind in ("Anon", "File"))
    return {count: own * count / counts[-1] + mapped for count in counts}


def read_by(daemons: Sequence[Daemon], model: str) -> Read:
    read_bytes = slots_filled = 0
    for daemon in daemons:
        connection = Connection(daemon.address, TIMEOUT_S)
        for one in connection.stats().models:
            if one.name == model:
                read_bytes, slots_filled = read_bytes + one.read_bytes, slots_filled + one.slots_filled
        connection.close()
    return Read(read_bytes, slots_filled)


def own_store(store: Path, target: Path) -> Path:
    """A store for a daemon of its own, because one daemon serves a store: links to the weights, its own catalog."""
    shutil.copytree(store, target, copy_function=os.link, ignore=lambda *_: [f"{CATALOG_FILE}-lock", DAEMON_LOCK_FILE])
    (target / CATALOG_FILE).unlink()
    shutil.copy(store / CATALOG_FILE, target)
    return target


@contextmanager
def daemons_of(planted: PlantedStore, count: int) -> Iterator[list[Daemon]]:
    """One daemon on the planted store, or several on stores of their own; half of the model for each."""
    dram_bytes = max(planted.model_bytes // 2, planted.least_bytes)
    with ExitStack() as opened:
        stores = [planted.store]
        if count > 1:
            folder = Path(opened.enter_context(TemporaryDirectory(prefix="own-stores-", dir=planted.store.parent)))
            stores = [own_store(planted.store, folder / str(i)) for i in range(count)]
        yield [opened.enter_context(serving(store, dram_bytes, COLD)) for store in stores]


def measured(planted: PlantedStore, task: Task, count: int, private: bool) -> Row:
    """One row: `count` clients that share a daemon, or that have one each."""
    with ExitStack() as opened:
        daemons = opened.enter_context(daemons_of(planted, count if private else 1))
        tasks = [replace(task, address=daemons[i % len(daemons)].address) for i in range(count)]
        started = opened.enter_context(clients(tasks))
        before = read_by(daemons, planted.name)
        for client in started:
            client.start()
        told = [client.told() for client in started]
        after = read_by(daemons, planted.name)
        pids = [*(client.pid for client in started), *(daemon.pid for daemon in daemons)]
        total_bytes = sum(map(process_bytes, pids)) + sum(shared_bytes(daemon.pid) for daemon in daemons)
    if len({one["digest"] for one in told}) != 1:
        raise BenchError(f"{count} clients in {task.mode} mode came to different results")
    speeds = [len(one["seconds"]) / one["all_s"] for one in told]
    return {
        "mode": task.mode,
        "daemons": "one each" if private else "one",
        "clients": count,
        "memory_gb": total_bytes / 1e9,
        "flash_gb": (after.read_bytes - before.read_bytes) / 1e9,
        "slots_filled": after.slots_filled,
        "tokens_per_s": sum(len(one["seconds"]) for one in told) / max(one["all_s"] for one in told),
        "tokens_per_s_each": sorted(speeds),
        "slowest_over_fastest": min(speeds) / max(speeds),
    }


def averaged(rows: Sequence[Row]) -> Row:
    """The average of several measurements of one row."""

    def mean(name: str) -> Any:
        values = [row[name] for row in rows]
        if isinstance(values[0], list):
            return [fmean(each) for each in zip(*values, strict=True)]
        return fmean(values) if isinstance(values[0], float) else values[0]

    return {name: mean(name) for name in rows[0]}


def measure(options: argparse.Namespace) -> tuple[Row, list[Row], list[Target]]:
    """Machine, rows and targets."""
    planted = planted_store(options.shape, options.folder)
    machine = machine_facts(options.folder) | {"shape": options.shape, "model_gb": planted.model_bytes / 1e9}
    counts = options.clients
    runtime_gb = {count: held / 1e9 for count, held in runtime_bytes(counts).items()}
    rows: list[Row] = []
    for mode in options.modes:
        tokens = MODES[mode]
        task = Task("", planted.name, mode, options.prompt_tokens, options.tokens or tokens, SEED)
        order = counts if options.once else (*counts, *reversed(counts))
        again = [measured(planted, task, count, private=False) for count in order]
        for count in counts:
            same = averaged([row for row in again if row["clients"] == count])
            rows.append(told(same | {"runtime_gb": runtime_gb[count]}))
        if counts[-1] > 1:
            rows.append(
                told(measured(planted, task, counts[-1], private=True) | {"runtime_gb": runtime_gb[counts[-1]]})
            )
    return machine, rows, targets_of([row for row in rows if row["daemons"] == "one"])


def told(row: Row) -> Row:
    """Reports on a terminal that a row is done."""
    if sys.stderr.isatty():
        print(f"{row['mode']}, {row['clients']} clients: {row['tokens_per_s']:.1f} tokens/s", file=sys.stderr)
    return row


def targets_of(rows: Sequence[Row]) -> list[Target]:
    """Compares the most clients with one client, in the worse of both modes."""
    first, last = min(row["clients"] for row in rows), max(row["clients"] for row in rows)
    if (first, last) != (1, 4) or {row["mode"] for row in rows} != set(MODES):
        return []
    pairs = [
        tuple(next(row for row in rows if row["mode"] == mode and row["clients"] == count) for count in (first, last))
        for mode in MODES
    ]

    def ratio(of: Any) -> list[float]:
        return [of(four) / of(one) for one, four in pairs]

    def model_gb(row: Row) -> float:
        return float(row["memory_gb"] - row["runtime_gb"])

    return [
        Target("memory_4_over_1_ratio", max(ratio(model_gb)), "x", 1.25, "lower"),
        Target("flash_bytes_4_over_1_ratio", max(ratio(lambda row: row["flash_gb"])), "x", 1.1, "lower"),
        Target("tokens_per_s_4_over_1_ratio", min(ratio(lambda row: row["tokens_per_s"])), "x", 1.0, "higher"),
        Target("slots_4_over_1_ratio", max(ratio(lambda row: row["slots_filled"])), "x", 1.0, "lower"),
        Target("slowest_over_fastest_of_4", min(four["slowest_over_fastest"] for _, four in pairs), "x", 0.8, "higher"),
    ]


def main() -> int:
    parser = FlagParser(__doc__)
    parser.add_argument(
        "--clients", type=counts_of, default=(1, 2, 4), help="rising numbers of clients (default: 1,2,4)"
    )
    parser.add_argument("--shape", choices=SHAPES, default="opt-1.3b", help="of the planted model")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench"), help="on the device to measure; its contents are kept"
    )
    parser.add_argument("--tokens", type=int, help="tokens to decode (default: 8 in exact mode, 64 in predict mode)")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    parser.add_argument("--once", action="store_true", help="measure each number of clients once")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    try:
        results = measure(options)
    except (BenchError, OSError) as error:
        print(f"bench_sharing: {error}", file=sys.stderr)
        return 1
    report(*results, options.json)
    return 0


def counts_of(text: str) -> tuple[int, ...]:
    """Parses a text like "1,2,4"."""
    counts = tuple(int(part) for part in text.split(","))
    if not counts or list(counts) != sorted(set(counts)) or counts[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of rising numbers: use 1,2,4")
    return counts


if __name__ == "__main__":
    sys.exit(main())
