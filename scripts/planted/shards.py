"""The files of a checkpoint that is written piece by piece: model-*.safetensors, their index, and JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

SPARE_BYTES = 64 << 20  # of the disk, beside the tensors


class Shards:
    """model-*.safetensors and their index."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count
        self._written = 0
        self._file_of: dict[str, str] = {}
        self._total_bytes = 0

    def write(self, tensors: dict[str, Any]) -> None:
        """Writes a file. tensors: by name."""
        self._written += 1
        name = f"model-{self._written:05}-of-{self._count:05}.safetensors"
        save_file(tensors, self._folder / name, metadata={"format": "pt"})
        self._file_of |= dict.fromkeys(tensors, name)
        self._total_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def write_index(self) -> None:
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": self._file_of}
        write_json(self._folder / "model.safetensors.index.json", index)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


@contextmanager
def new_folder(target: Path, size_bytes: int) -> Iterator[Path]:
    """A folder to write `size_bytes` into, which becomes `target` at the end, or is deleted after an error.

    Raises:
        OSError: `target` exists, or the disk is too small.
    """
    if target.exists():
        raise OSError(f"{target} exists: remove it, or give another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < size_bytes + SPARE_BYTES:
        needed, free = ((size_bytes + SPARE_BYTES) / 1e9, free_bytes / 1e9)
        raise OSError(f"{target.parent} has {free:.1f} GB free, {target.name} needs {needed:.1f}: give another folder")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
