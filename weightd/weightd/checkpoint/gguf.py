"""Opens a GGUF file as a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightd.checkpoint.checkpoint import Checkpoint
from weightd.checkpoint.gguf_config import FREQUENCIES, GgufConfig
from weightd.checkpoint.gguf_file import GgufFile, read_gguf
from weightd.checkpoint.gguf_files import check_keys, check_packages, write_files
from weightd.checkpoint.gguf_names import GgufNames, check_architecture
from weightd.errors import CheckpointError
from weightd_proto.encodings import plain

VECTOR_ELEMENTS_MAX = 65536


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint in a GGUF file. Its configuration comes from the header (gguf_config.py), its tokenizer from
    transformers' conversion (gguf_tokenizer.py)."""
    check_packages(path)
    file = read_gguf(path)
    architecture = check_architecture(file.architecture)
    check_keys(file)
    config = GgufConfig(file, _small_vector(file, FREQUENCIES)).config()
    tensors = GgufNames(architecture, config).renamed(file.tensors)
    return Checkpoint(path, config, tensors, lambda folder: write_files(file, config, folder))


def _small_vector(file: GgufFile, name: str) -> npt.NDArray[np.float32] | None:
    """The values of an F32 vector, or None if the file has no such tensor."""
    tensor = file.tensors.get(name)
    if tensor is None:
        return None
    if tensor.encoding != plain("F32") or len(tensor.shape) != 1 or tensor.elements > VECTOR_ELEMENTS_MAX:
        raise CheckpointError(
            f"{file.path} holds {name} as {list(tensor.shape)} of {tensor.dtype}, not a small F32 vector"
        )
    return np.fromfile(tensor.path, "<f4", tensor.elements, offset=tensor.offset_bytes)
