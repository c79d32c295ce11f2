"""neurostream as a peer: it streams what does not fit into memory, and runs models of Qwen3's architecture."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_import import make_cold

from benchmarks.cgroup import capped_memory
from benchmarks.llama import install
from benchmarks.processes import SCRIPTS, run_json

PACKAGES = ("neurostream", "regex")  # without torch and numpy, which this interpreter has
DEFAULT = Path.home() / ".cache" / "weightd-bench" / "neurostream"


@dataclass(frozen=True)
class NeurostreamTask:
    """What neurostream decodes: the ids of `plan`, a JSON file. All are arguments of neurostream_decode.py."""

    gguf: Path
    plan: Path
    prompt_tokens: int
    new_tokens: int


def decode_neurostream(task: NeurostreamTask, memory_bytes: int, weights_bytes: int, block_rows: int) -> dict[str, Any]:
    """The output of neurostream_decode.py, from a cold page cache, in a memory cgroup of `memory_bytes`.

    Args:
        weights_bytes: of weights that stay in memory.
        block_rows: of what is read at once.

    Raises:
        BenchError: it failed, or its packages cannot be installed.
    """
    if not (DEFAULT / "neurostream").exists():
        install(["--no-deps", "--target", str(DEFAULT), *PACKAGES], sys.executable, "give --no-peers to go without it")
    make_cold(task.gguf.parent)
    numbers = map(str, (task.prompt_tokens, task.new_tokens, weights_bytes, block_rows))
    program = str(SCRIPTS / "benchmarks" / "neurostream_decode.py")
    with capped_memory(memory_bytes) as cgroup:
        command = [*cgroup.prefix, sys.executable, program, str(task.gguf), str(task.plan), *numbers]
        told: dict[str, Any] = run_json(command, "neurostream", os.environ | {"PYTHONPATH": str(DEFAULT)})
    return told | {"memory_bytes": memory_bytes}
