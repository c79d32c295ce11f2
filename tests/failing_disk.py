"""A file system that fails on purpose: a folder seen through FUSE, whose reads a test makes fail, lie, stop or wait.

    python failing_disk.py FOLDER MOUNTPOINT

Rules come as JSON, one a line, through standard input; each is acknowledged through standard output, where "held" also
says that a read has begun to wait. O_DIRECT and io_uring work on it as on a disk: what fails is the read itself.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__)
BLOCK_BYTES = 4096


@dataclass
class Rule:
    """What becomes of reads of `file` that touch bytes [begin, end).

    kind: 'error' (EIO), 'short' (one block of it), 'flip' (a wrong bit comes) or 'hold' (until the disk is healed);
    'hold open' is not of reads, but of the file's opening.
    """

    file: str
    kind: str
    begin: int = 0
    end: int = 1 << 62
    times: int = 1 << 62  # then it is spent

    def concerns(self, path: str, offset: int, size: int) -> bool:
        inside = offset < self.end and self.begin < offset + size
        return self.times > 0 and inside and self.kind != "hold open" and path.endswith("/" + self.file)

    def concerns_opening(self, path: str) -> bool:
        return self.times > 0 and self.kind == "hold open" and path.endswith("/" + self.file)


class FailingDisk:
    """The mounted file system, from the test's side."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self._answer() == "mounted"

    def add(self, rule: Rule) -> None:
        """In force when this returns."""
        self._tell(json.dumps(asdict(rule)))

    def heal(self) -> None:
        """No rule is left, and what was held goes on."""
        self._tell("null")

    def await_held(self) -> None:
        """Until one more read or opening is being held."""
        assert self._answer() == "held"

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        while (answer := self._answer()) != "done":
            assert answer == "held"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        if answer.startswith("cannot"):
            pytest.skip(answer)
        return answer


@contextmanager
def failing_disk(folder: Path) -> Iterator[FailingDisk]:
    """Puts itself in the place of `folder`; skips the test where nothing can be mounted."""
    behind = folder.with_name(f"{folder.name}.behind")
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("needs root and /dev/fuse")
    folder.rename(behind)
    folder.mkdir()
    command = [sys.executable, str(HERE), str(behind), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        disk = FailingDisk(process)
        try:
            yield disk
        finally:
            disk.heal()
    finally:
        if os.path.ismount(folder):
            subprocess.run(["umount", "--lazy", folder], check=True)
        process.communicate(timeout=30)
        folder.rmdir()
        shutil.move(behind, folder)


class Folder:
    """The operations of the file system, in threads of libfuse, so that held reads hold up no others."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._changed = threading.Condition()  # guards _rules
        self._rules: list[Rule] = []

    def listen(self) -> None:
        """Takes rules from standard input, until it closes."""
        for line in sys.stdin:
            given = json.loads(line)
            with self._changed:
                self._rules = [] if given is None else [*self._rules, Rule(**given)]
                self._changed.notify_all()
            print("done", flush=True)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        rule = self._obey(lambda rule: rule.concerns(path, offset, size))
        kind = None if rule is None else rule.kind
        if kind == "error":
            raise OSError(errno.EIO, "a bad block", path)
        data = os.pread(fh, BLOCK_BYTES if kind == "short" else size, offset)
        return bytes([data[0] ^ 1]) + data[1:] if kind == "flip" else data

    def _obey(self, concerned: Callable[[Rule], bool]) -> Rule | None:
        with self._changed:
            rule = next(filter(concerned, self._rules), None)
            if rule is not None:
                rule.times -= 1
            if rule is not None and rule.kind.startswith("hold"):
                print("held", flush=True)
                self._changed.wait_for(lambda: rule not in self._rules)
            return rule

    def init(self, path: str) -> None:
        print("mounted", flush=True)
        threading.Thread(target=self.listen, daemon=True).start()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        status = os.lstat(self._real(path))
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid")
        return {name: getattr(status, name) for name in names}

    def readdir(self, path: str, fh: int) -> Iterator[str]:
        yield from (".", "..", *(entry.name for entry in self._real(path).iterdir()))

    def open(self, path: str, flags: int) -> int:
        self._obey(lambda rule: rule.concerns_opening(path))
        return os.open(self._real(path), flags & ~os.O_DIRECT)

    def release(self, path: str, fh: int) -> None:
        os.close(fh)

    def _real(self, path: str) -> Path:
        return self._folder / path.removeprefix("/")


def main() -> None:
    try:
        import mfusepy

        operations = type("Operations", (Folder, mfusepy.Operations), {"use_ns": True})(Path(sys.argv[1]))
        mfusepy.FUSE(operations, sys.argv[2], foreground=True, ro=True, direct_io=True)
    except (OSError, RuntimeError) as error:
        print(f"cannot mount a failing disk: {error}", flush=True)


if __name__ == "__main__":
    main()
