"""A checkpoint to import: its tensors, where their bytes lie, and the files that go with them.

Safetensors, torch's zip files and GGUF differ only in how they record where a tensor begins. All are read the same way:
ranges of a file, past the page cache (disk/uncached_file.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightd.disk.tensors import SourceTensor
from weightd.errors import CheckpointError
from weightd.sizes import format_size

JSON_BYTES_MAX = 128 << 20  # the size of an index of 10 million tensors


@dataclass(frozen=True)
class Checkpoint:
    """Tensors, the configuration, and a function that writes the other files.

    Tensors have the names of the checkpoint. `gguf`: the architecture of a GGUF file, whose names are llama.cpp's.
    `notes`: what a user should know.
    """

    path: Path
    config: Mapping[str, Any]  # config.json as transformers writes it
    tensors: Mapping[str, SourceTensor]
    write_files: Callable[[Path], None] = field(repr=False)  # config, generation config, tokenizer into a folder
    gguf: str = ""
    notes: tuple[str, ...] = ()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. CheckpointError if the file is anything else."""
    size_bytes = path.stat().st_size
    if size_bytes > JSON_BYTES_MAX:
        raise CheckpointError(f"{path} takes {format_size(size_bytes)}, more than a configuration or index ever does")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): the download may be incomplete") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value
