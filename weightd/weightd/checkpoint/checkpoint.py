"""A checkpoint to import: which tensors it has, where their bytes lie, and the files that go with them.

One abstraction for every input. Safetensors, torch's zip files and GGUF differ only in how they say where a tensor
begins; reading is the same for all: ranges of a file, past the page cache (uncached_file.py).
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

JSON_BYTES_MAX = 128 << 20  # the index of 10 million tensors would be as large


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by their name in the checkpoint, the model's configuration, and how to write its other files."""

    path: Path
    config: Mapping[str, Any]  # config.json as transformers writes it
    tensors: Mapping[str, SourceTensor]
    write_files: Callable[[Path], None] = field(repr=False)  # config, generation config, tokenizer into a folder
    gguf_architecture: str | None = None  # names are llama.cpp's then


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError when it is something else."""
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
