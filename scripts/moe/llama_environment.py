"""A virtual environment that has llama-cpp-python, built for this processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.processes import BenchError

PACKAGE = "llama-cpp-python"
# Whole instruction set of this processor; the wheels of the index have the least common one.
BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
DEFAULT = Path.home() / ".cache" / "weightd-bench" / "llama-cpp"


def llama_python(folder: Path) -> Path:
    """Its interpreter. Makes the environment in `folder` if there is none, which takes some minutes.

    Raises:
        BenchError: the package cannot be built; has the last line of pip.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder)])
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False).returncode != 0:
        _run([str(python), "-m", "pip", "install", "--quiet", "--no-binary", PACKAGE, PACKAGE])
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | BUILD)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise BenchError(f"{PACKAGE} cannot be installed: {said[-1]}; give --llama-cpp an environment that has it")
