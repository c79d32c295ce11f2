"""A checkpoint to import: which tensors it has, where their bytes lie, and the files that go with them.

One abstraction for every input. Safetensors, torch's zip files and GGUF differ only in how they say where a tensor
begins; reading is the same for all: ranges of a file, past the page cache (uncached_file.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from weightd.errors import CheckpointError
from weightd.sizes import format_size

FLOAT_DTYPES = ("F32", "BF16", "F16")
JSON_BYTES_MAX = 128 << 20  # the index of 10 million tensors would be as large
ELEMENT_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Encoding:
    """How the elements of a tensor are stored: `block_bytes` for every `block_elements` of a row."""

    dtype: str  # of the elements when decoded: as safetensors spells it; F32 for what is quantised
    block_elements: int
    block_bytes: int
    ggml_type: int | None = None  # of quantised blocks


def plain(dtype: str) -> Encoding:
    """The encoding of elements stored as they are."""
    return Encoding(dtype, 1, ELEMENT_BYTES[dtype])


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a checkpoint: contiguous, row-major, `shape` as in transformers' state_dict."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    path: Path
    offset_bytes: int

    @property
    def dtype(self) -> str:
        return self.encoding.dtype

    @property
    def elements(self) -> int:
        return prod(self.shape)

    def bytes_of(self, elements: int) -> int:
        """Stored bytes of that many elements, which must be whole blocks."""
        assert elements % self.encoding.block_elements == 0
        return elements // self.encoding.block_elements * self.encoding.block_bytes


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by their name in the checkpoint, the model's configuration, and how to write its other files."""

    path: Path
    config: Mapping[str, Any]  # config.json as transformers writes it
    tensors: Mapping[str, SourceTensor]
    write_files: Callable[[Path], None] = field(repr=False)  # config, generation config, tokenizer into a folder
    gguf_architecture: str | None = None  # names are llama.cpp's then


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a Hugging Face folder, a .gguf file, or a folder holding just one .gguf file.

    Reads headers only. CheckpointError when it is missing, incomplete or of an unknown kind.
    """
    from weightd import folder_checkpoint, gguf_checkpoint
    from weightd.model_folder import ModelFolder

    check_exists(path)
    if path.is_file():
        return gguf_checkpoint.open_gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a file nor a folder: give a Hugging Face folder or a .gguf file")
    folder = ModelFolder(path)
    gguf_files = folder.matching(("*.gguf",))
    if not folder.has(folder_checkpoint.CONFIG_FILE) and len(gguf_files) == 1:
        return gguf_checkpoint.open_gguf(folder.file(gguf_files[0]))
    return folder_checkpoint.open_folder(path)


def check_exists(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: give a Hugging Face folder or a .gguf file")


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


def check_extent(tensor: SourceTensor, file_bytes: int) -> None:
    """CheckpointError if the tensor reaches beyond its file."""
    end_bytes = tensor.offset_bytes + tensor.bytes_of(tensor.elements)
    if end_bytes > file_bytes:
        raise CheckpointError(
            f"{tensor.path} is incomplete: {format_size(file_bytes)} on disk, but {tensor.name} ends at "
            f"{format_size(end_bytes)}; download it again"
        )
