"""Runs the command `weightd` as a child process."""

from __future__ import annotations

import os
import subprocess
import sys

from flashclient.daemon.channel import in_arguments
from flashclient.errors import StartError

# -P: Python imports nothing from the current folder.
WEIGHTD = [sys.executable, "-P", "-m", "weightd"]


def environment() -> dict[str, str]:
    """This process's environment, without those entries of PYTHONPATH that stand for the current folder."""
    environment = dict(os.environ)
    if path := environment.pop("PYTHONPATH", ""):
        kept = [entry for entry in path.split(os.pathsep) if entry.strip("./") or entry.startswith(("/", ".."))]
        environment |= {"PYTHONPATH": os.pathsep.join(kept)} if kept else {}
    return environment


def output_of(command: list[str], failed: str, *descriptors: int) -> str:
    """The standard output of `command`, which is stopped if this process is interrupted.

    Raises StartError, which begins with `failed` and ends with the last line of the command's errors.

    `descriptors`: what the command inherits beside the standard streams.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="backslashreplace",
        env=environment(),
        pass_fds=descriptors,
    ) as child:
        try:
            output, errors = child.communicate()
        except BaseException:
            child.terminate()  # the import removes what it has written
            raise
    if child.returncode != 0:
        said = last_words(errors.strip().splitlines()) or f"it ended with status {child.returncode}"
        raise StartError(f"{failed}: {said}")
    return output


def last_words(lines: list[str]) -> str:
    """The last of the lines that a weightd wrote, with this library's argument in place of its flag."""
    return in_arguments(lines[-1].removeprefix("weightd: ")) if lines else ""
