#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Compares the import of a Llama-shaped checkpoint of 2.2 GB with a copy of its files.

Both start with a cold page cache and end with everything synced, and take turns in ABBA order. The checkpoint has
TinyLlama's shape in bf16 and random numbers. Peak memory is what the import takes above an interpreter with the same
modules.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

from benchmarks.report import Row, Target, abba, machine_facts, middle, report
from flags import FlagParser
from planted.noise import write_noise

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
RATIO_TARGET = 0.8
RAM_BYTES_MAX = 256 << 20  # two layers of this model are less
# Runs the command, if one is given, and prints its own peak memory: ru_maxrss would start with this process's peak.
CHILD = """
import re, sys
from pathlib import Path
import weightd.cli, weightd.importing.convert, weightd.checkpoint.folder, weightd.disk.safetensors_file
status = weightd.cli.main(sys.argv[1:]) if len(sys.argv) > 1 else 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(status)
"""


@dataclass(frozen=True)
class Run:
    """One copy or import."""

    seconds: float
    peak_bytes: int  # of an import; 0 of a copy, which uses the page cache


def make_cold(folder: Path) -> None:
    """Syncs the files and drops them from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def run_weightd(*arguments: str) -> int:
    """Runs `weightd` with the arguments, or only imports it, and returns its peak resident memory in bytes."""
    result = subprocess.run([sys.executable, "-c", CHILD, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return int(result.stdout.split()[-1]) * 1024


def copy(source: Path, target: Path) -> int:
    """Copies the files. Gives no peak memory, because a copy uses only the page cache."""
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in [*target.rglob("*"), target, target.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return 0


def import_model(source: Path, target: Path) -> int:
    return run_weightd("import", str(source), "--store", str(target))


def measure(how: Callable[[Path, Path], int], source: Path, target: Path) -> Run:
    """One run from a cold cache; removes what it wrote."""
    make_cold(source)
    begin = time.monotonic()
    peak_bytes = how(source, target)
    seconds = time.monotonic() - begin
    shutil.rmtree(target)
    return Run(seconds, peak_bytes)


def main() -> int:
    parser = FlagParser(__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the device to measure; needs 5 GB")
    parser.add_argument("--rounds", type=int, default=2, help="ABBA rounds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-import-", dir=options.folder) as name:
        folder = Path(name)
        machine = machine_facts(folder)
        source = folder / "model"
        source.mkdir()
        size_bytes = write_noise(CONFIG, source)
        target = folder / "target"
        copies, imports = abba(
            partial(measure, copy, source, target), partial(measure, import_model, source, target), options.rounds
        )
    rows = [row_of(way, runs, size_bytes) for way, runs in (("cp and fsync", copies), ("import", imports))]
    ratio = rows[0]["median_s"] / rows[1]["median_s"]
    ram_bytes = max(run.peak_bytes for run in imports) - run_weightd()
    targets = [
        Target("import_speed_ratio", ratio, "of a copy's speed", RATIO_TARGET, "higher"),
        Target("import_ram_over_interpreter_bytes", ram_bytes, "bytes", RAM_BYTES_MAX, "lower"),
    ]
    report(machine, rows, targets, options.json)
    return 0


def row_of(way: str, runs: list[Run], size_bytes: int) -> Row:
    median_s = middle(runs, attrgetter("seconds"))
    row: Row = {"way": way, "checkpoint_bytes": size_bytes, "median_s": median_s}
    return row | {"gb_per_s": size_bytes / median_s / 1e9, "runs_s": [round(run.seconds, 3) for run in runs]}


if __name__ == "__main__":
    sys.exit(main())
