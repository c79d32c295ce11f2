#!/usr/bin/env python3
"""Import of a Llama-shaped checkpoint of 2.2 GB against a copy of its files.

Both start from a cold page cache and end with everything synced; they take turns in ABBA order. The checkpoint is
TinyLlama's shape in bf16 with random bits. Peak memory is the import's over an interpreter with the same modules.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from weightd.families import recipe_of
from weightd.sizes import format_size

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
TARGET_RATIO = 0.8
RANDOM_BYTES = 64 << 20
# Runs the command, if one is given, and prints its own peak memory: ru_maxrss would start with this process's peak.
CHILD = """
import re, sys
from pathlib import Path
import weightd.cli, weightd.convert, weightd.folder_checkpoint, weightd.safetensors_file
status = weightd.cli.main(sys.argv[1:]) if len(sys.argv) > 1 else 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(status)
"""


def write_checkpoint(folder: Path) -> int:
    """Writes config.json and model.safetensors; returns the bytes of the latter."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    entries, offset_bytes = {}, 0
    for name, shape in sorted(recipe_of(CONFIG).shapes().items()):
        end_bytes = offset_bytes + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset_bytes, end_bytes]}
        offset_bytes = end_bytes
    header = json.dumps(entries).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    noise = memoryview(np.random.default_rng(0).bytes(RANDOM_BYTES))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for begin in range(0, offset_bytes, RANDOM_BYTES):
            file.write(noise[: min(RANDOM_BYTES, offset_bytes - begin)])
    return 8 + len(header) + offset_bytes


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
    """Returns no peak: the page cache is what it uses."""
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in [*target.rglob("*"), target, target.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return 0


def import_model(source: Path, target: Path) -> int:
    return run_weightd("import", str(source), "--store", str(target))


def measure(how: Callable[[Path, Path], int], source: Path, target: Path) -> tuple[float, int]:
    """Seconds and peak memory of one run; removes what it wrote."""
    make_cold(source)
    begin = time.monotonic()
    peak_bytes = how(source, target)
    seconds = time.monotonic() - begin
    shutil.rmtree(target)
    return seconds, peak_bytes


def run(folder: Path, rounds: int) -> dict[str, Any]:
    source = folder / "model"
    source.mkdir()
    size_bytes = write_checkpoint(source)
    ways: dict[str, Callable[[Path, Path], int]] = {"copy": copy, "import": import_model}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int] = dict.fromkeys(ways, 0)
    for name in ("copy", "import", "import", "copy") * rounds:
        took, peak_bytes = measure(ways[name], source, folder / "target")
        seconds[name].append(took)
        peaks[name] = max(peaks[name], peak_bytes)
    interpreter_bytes = run_weightd()
    return report(size_bytes, seconds, peaks["import"] - interpreter_bytes)


def report(size_bytes: int, seconds: dict[str, list[float]], import_ram_bytes: int) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["copy"] / medians["import"]
    ram_bytes_max = 256 << 20  # two layers of this model are less
    rows = [
        {"way": name, "median_s": medians[name], "gb_per_s": size_bytes / medians[name] / 1e9, "runs_s": seconds[name]}
        for name in seconds
    ]
    targets = [
        ("import_speed_ratio", ratio, "of a copy's speed", TARGET_RATIO, "higher"),
        ("import_ram_over_interpreter_bytes", import_ram_bytes, "bytes", ram_bytes_max, "lower"),
    ]
    return {
        "machine": {"cpu_count": os.cpu_count(), "kernel": platform.release(), "architecture": platform.machine()},
        "checkpoint_bytes": size_bytes,
        "rows": rows,
        "targets": [
            {
                "name": name,
                "value": value,
                "unit": unit,
                "target": target,
                "better": better,
                "met": value >= target if better == "higher" else value <= target,
            }
            for name, value, unit, target, better in targets
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="one object on standard output")
    parser.add_argument("--folder", type=Path, help="where to work, on the device to measure; needs 5 GB")
    parser.add_argument("--rounds", type=int, default=2, help="ABBA rounds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = run(Path(folder), options.rounds)
    if options.json:
        print(json.dumps(result))
        return
    for row in result["rows"]:
        print(f"{row['way']:<8}{row['median_s']:8.2f} s{row['gb_per_s']:8.2f} GB/s")
    ratio, ram = result["targets"]
    print(f"import at {ratio['value']:.2f} of the copy's speed, {format_size(ram['value'])} over the interpreter")


if __name__ == "__main__":
    main()
