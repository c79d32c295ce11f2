"""A process that forks clients and ends them when its standard input closes."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence


class ParentProcess:
    """Runs `command`, which is such a process.

    Attributes:
        stdin, stdout: of the process, as bytes.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.stdin, self.stdout = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self) -> int:
        """Waits until the process has ended by itself. Returns its exit status."""
        return self._process.wait()

    def end(self) -> int:
        """Closes the process's standard input and waits for its end. Returns its exit status."""
        self.stdin.close()
        status = self._process.wait()
        self.stdout.close()
        return status
