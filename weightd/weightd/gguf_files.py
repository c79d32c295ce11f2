"""config.json, generation config and tokenizer of a GGUF file, by transformers' own conversion.

Runs in a child process: transformers and a converted vocabulary take hundreds of megabytes, which are given back
before the first weight is read.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from weightd.errors import CheckpointError

PACKAGES = ("gguf", "torch", "transformers")


def check_packages(path: Path) -> None:
    """CheckpointError names what is not installed."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise CheckpointError(f"{path} needs {' and '.join(missing)} to be read: pip install 'weightd[import]'")


def read_config(path: Path) -> dict[str, Any]:
    """The configuration, as config.json would hold it."""
    config = json.loads(_in_child("config", path))
    assert isinstance(config, dict)
    return config


def write_files(path: Path, folder: Path) -> None:
    """Writes config.json, generation_config.json and, if the file has a vocabulary, the tokenizer's files."""
    _in_child("files", path, folder)


def _in_child(*arguments: str | Path) -> str:
    command = [sys.executable, "-P", "-m", "weightd.gguf_conversion", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise CheckpointError(f"transformers cannot convert {arguments[1]}: {lines[-1]}")
    return result.stdout
