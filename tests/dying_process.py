"""Runs an import, a removal or a publishing that is killed at a named point of its writing.

    python dying_process.py POINT import STORE SRC NAME
    python dying_process.py POINT rm STORE NAME
    python dying_process.py POINT publish STORE NAME          (a calibration, stored_calibration.py's of seed 2)

A point is "before|after CALL FILE", matched as a shell pattern against the system calls that the real code makes, or
"put KEY": between two puts of the catalog's transaction, or "fdatasync" or "write of the meta page": inside LMDB's
commit, where a seccomp filter kills the process at that very system call.
"""

from __future__ import annotations

import functools
import os
import platform
import signal
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import seccomp

CALLS = ("mkdir", "open", "posix_fallocate", "pwritev", "ftruncate", "fsync", "rename", "unlink", "rmdir")
COMMIT_POINTS = ("fdatasync", "write of the meta page")
# By architecture: fdatasync, pwrite64.
SYSTEM_CALLS = {"x86_64": (75, 18), "aarch64": (83, 68)}
PAGE_BYTES = 4096


def reach(event: str, point: str) -> None:
    if fnmatchcase(event, point):
        os.kill(os.getpid(), signal.SIGKILL)


def name_of(argument: Any) -> str:
    path = Path(f"/proc/self/fd/{argument}").readlink() if isinstance(argument, int) else Path(argument)
    return path.name


def watch(call: str, point: str) -> None:
    original: Callable[..., Any] = getattr(os, call)

    @functools.wraps(original)
    def watched(first: Any, *arguments: Any, **options: Any) -> Any:
        name = name_of(first)
        reach(f"before {call} {name}", point)
        result = original(first, *arguments, **options)
        reach(f"after {call} {name}", point)
        return result

    setattr(os, call, watched)


def filter_program(point: str) -> list[seccomp.Instruction]:
    """Kills at fdatasync, or at a pwrite64 of less than a page, which is LMDB's write of the meta page."""
    fdatasync, pwrite = SYSTEM_CALLS[platform.machine()]
    number = (seccomp.LOAD_WORD, 0, 0, seccomp.NUMBER_OFFSET_BYTES)
    end = [(seccomp.RETURN, 0, 0, seccomp.ALLOW), (seccomp.RETURN, 0, 0, seccomp.KILL_PROCESS)]
    if point == "fdatasync":
        return [number, (seccomp.JUMP_EQUAL, 1, 0, fdatasync), *end]
    count = (seccomp.LOAD_WORD, 0, 0, seccomp.ARGUMENTS_OFFSET_BYTES + 2 * 8)
    less = (seccomp.JUMP_GREATER_EQUAL, 0, 1, PAGE_BYTES)
    return [number, (seccomp.JUMP_EQUAL, 0, 2, pwrite), count, less, *end]


def watch_catalog(point: str) -> None:
    from weightd import catalog

    original_key, original_open = catalog.array_key, catalog._open

    def key(kind: str, model: str, layer: int) -> bytes:
        reach(f"put {kind}/{model}/{layer}", point)
        return original_key(kind, model, layer)

    def opened(path: Path, write: bool, create: bool) -> Any:
        environment = original_open(path, write, create)
        if write and point in COMMIT_POINTS:
            seccomp.install(filter_program(point))
        return environment

    catalog.array_key, catalog._open = key, opened


def publish(path: Path, name: str) -> int:
    from stored_calibration import offline

    from weightd.store import Store

    with Store.open(path) as store:
        offline(path, store.model(name), seed=2)
    return 0


def main() -> None:
    point, action, store_path, *arguments = sys.argv[1:]
    from weightd import rehearsal
    from weightd.cli import main as weightd

    rehearsal._rehearse = lambda record, folder: ""  # takes seconds, and writes nothing
    for call in CALLS:
        watch(call, point)
    watch_catalog(point)
    if action == "import":
        status = weightd(["import", arguments[0], "--store", store_path, "--name", arguments[1]])
    elif action == "rm":
        status = weightd(["rm", arguments[0], "--store", store_path])
    else:
        status = publish(Path(store_path), arguments[0])
    sys.exit(f"reached the end with status {status}, not {point!r}")


if __name__ == "__main__":
    main()
