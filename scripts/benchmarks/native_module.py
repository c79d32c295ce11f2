"""The C++ that benchmarks compare the daemon with (scripts/benchmarks/native): built on first use, then imported.

Its core is that of the Python modules, in build/modules. `weightd._native` and `flashclient._native` are imported
first, because the module uses their types.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import nanobind  # type: ignore[import-untyped]

import flashclient._native  # noqa: F401 - the module uses types of both
import weightd._native  # noqa: F401
from benchmarks.processes import SCRIPTS, BenchError

ROOT = SCRIPTS.parent
BUILD = ROOT / "build" / "modules"
TARGET = "bench_native"


@cache
def bench_native() -> Any:
    """The module. Raises BenchError with the last words of the compiler when it cannot be built."""
    BUILD.mkdir(parents=True, exist_ok=True)
    lock = os.open(BUILD, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several tests or benchmarks may come at once
        _run(
            "cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DWEIGHTD_BENCH=ON",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dnanobind_DIR={nanobind.cmake_dir()}",
        )  # fmt: skip
        _run("cmake", "--build", str(BUILD), "--target", TARGET)
        return _imported(next(BUILD.glob(f"{TARGET}*.so")))
    finally:
        os.close(lock)


def _run(*command: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # where ninja is
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PATH": path})
    if done.returncode:
        raise BenchError(f"{command[0]}: {(done.stdout + done.stderr).strip()[-2000:]}")


def _imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(TARGET, path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
