"""llama.cpp as a peer: an environment that has llama-cpp-python, and a run of it with a file mapped into memory."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_import import make_cold

from benchmarks.cgroup import capped_memory
from benchmarks.processes import SCRIPTS, BenchError, run_json
from benchmarks.readahead import readahead

PACKAGE = "llama-cpp-python"
REMEDY = "give --llama-cpp an environment that has it"
# Whole instruction set of this processor; the wheels of the index have the least common one.
BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
DEFAULT = Path.home() / ".cache" / "weightd-bench" / "llama-cpp"
READAHEAD_KIB = 128  # Linux's default


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--readahead-kib and --llama-cpp."""
    parser.add_argument(
        "--readahead-kib", nargs="+", type=int, default=[READAHEAD_KIB], help="of the device, for rows of llama.cpp"
    )
    add_environment_flag(parser)


def add_environment_flag(parser: argparse.ArgumentParser) -> None:
    """--llama-cpp."""
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        default=DEFAULT,
        metavar="DIR",
        help=f"a virtual environment with llama-cpp-python, made there if missing (default: {DEFAULT})",
    )


def llama_python(folder: Path) -> Path:
    """Its interpreter. Makes the environment in `folder` if there is none, which takes some minutes.

    Raises:
        BenchError: the package cannot be built; has the last line of pip.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder)], PACKAGE, REMEDY)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False).returncode != 0:
        install(["--no-binary", PACKAGE, PACKAGE], str(python), REMEDY)
    return python


def install(arguments: Sequence[str], python: str, remedy: str) -> None:
    """Installs packages with pip. Raises BenchError with its last line and the remedy if that fails."""
    _run([python, "-m", "pip", "install", "--quiet", *arguments], arguments[-1], remedy)


def _run(command: list[str], package: str, remedy: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | BUILD)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise BenchError(f"{package} cannot be installed: {said[-1]}; {remedy}")


@dataclass(frozen=True)
class LlamaTask:
    """What llama.cpp decodes: the ids of `plan`, a JSON file. All but `python` are arguments of llama_decode.py."""

    python: Path
    gguf: Path
    plan: Path
    prompt_tokens: int
    new_tokens: int
    threads: int


def decode_llama(task: LlamaTask, memory_bytes: int, readahead_kib: int) -> dict[str, Any]:
    """The output of llama_decode.py, from a cold page cache, in a memory cgroup of `memory_bytes`.

    Raises:
        BenchError: it failed, or the readahead of the device cannot be set.
    """
    program = [str(task.python), str(SCRIPTS / "benchmarks" / "llama_decode.py")]
    numbers = map(str, (task.prompt_tokens, task.new_tokens, task.threads))
    make_cold(task.gguf.parent)
    with ExitStack() as opened:
        opened.enter_context(readahead(task.gguf, readahead_kib))
        cgroup = opened.enter_context(capped_memory(memory_bytes))
        command = [*cgroup.prefix, *program, str(task.gguf), str(task.plan), *numbers]
        told: dict[str, Any] = run_json(command, "llama.cpp")
        return told | {"memory_bytes": memory_bytes}
