"""Ctrl-C while a command imports its modules: status 130, and nothing is printed, but what a server loads."""

from __future__ import annotations

import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

from flashclient import interrupts

INTERRUPTED = """
import importlib.abc, runpy, signal, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == during:
            sys.meta_path.remove(self)
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("so extensions say that are imported in half") from None

during = sys.argv.pop(1)
sys.meta_path.insert(0, Finder())
sys.argv.pop(0)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("during", "words"),
    [
        ("flashclient.cli", "flashclient generate m Hi"),
        ("flashclient.commands.sampling", "flashclient serve m"),
        ("weightd.cli", "weightd ls --store s"),
        ("lmdb", "weightd ls --store s"),
        ("weightd.serving.serve", "weightd --store s"),
        ("uvloop", "weightd --store s"),
        ("weightd.planning.plan", "weightd plan s"),
        ("transformers.utils", "flashclient generate . Hi --store s"),
        ("transformers.utils", "flashclient serve . --store s --port 0"),
        ("transformers.utils", "flashclient calibrate m --text t --store s"),
        ("transformers.utils", "flashclient eval m --text t --store s"),
    ],
)
def test_imports_end_at_once(during: str, words: str) -> None:
    command = [sys.executable, "-P", "-c", INTERRUPTED, during, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stderr.removeprefix("flashclient: loading .\n")
    assert (done.returncode, done.stdout, said) == (interrupts.STATUS, "", "")


def test_installed_commands_begin_there() -> None:
    scripts = tomllib.loads((Path(ROOT) / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {name: f"{name}.__main__:main" for name in ("weightd", "flashclient")}


@pytest.fixture
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_what_was_set_comes_back(handler: None, before: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, before)
    interrupts.end_quietly()
    assert (signal.getsignal(signal.SIGINT) == before) == (before == signal.SIG_IGN)
    interrupts.raise_again()
    assert signal.getsignal(signal.SIGINT) == before
