"""Opens a GGUF file as a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightd.checkpoint.checkpoint import Checkpoint
from weightd.checkpoint.gguf_architectures import architecture_of, restored
from weightd.checkpoint.gguf_config import VECTORS, GgufConfig
from weightd.checkpoint.gguf_file import GgufFile, read_gguf
from weightd.checkpoint.gguf_files import check_keys, check_packages, write_files
from weightd.checkpoint.gguf_keys import GgufKeys
from weightd.checkpoint.model_folder import ModelFolder
from weightd.errors import CheckpointError
from weightd_proto.encodings import plain

VECTOR_ELEMENTS_MAX = 65536


def open_gguf(path: Path, folder: ModelFolder | None = None) -> Checkpoint:
    """The checkpoint in a GGUF file, which the user has named, or which lies in `folder`.

    Its configuration comes from the header (gguf_config.py), its tokenizer from transformers' conversion
    (gguf_tokenizer.py). Its tensors keep their names.
    """
    check_packages(path)
    file = read_gguf(path, folder)
    check_keys(file)
    keys = GgufKeys(file)
    architecture = architecture_of(file.architecture, lambda key: bool(keys.value(key)))
    if not file.tensors:
        raise CheckpointError(f"{path} holds no tensors, only a vocabulary: give the file of the model itself")
    vectors = {name: _small_vector(file, name) for name in VECTORS if name in file.tensors} if architecture.rope else {}
    config = GgufConfig(file, keys, architecture, vectors).config()
    heads = keys.size("attention.head_count")
    tensors = {name: tensor for name, tensor in file.tensors.items() if name not in vectors}
    tensors = restored(tensors, architecture, heads, config.get("num_key_value_heads", heads))
    return Checkpoint(path, config, tensors, lambda folder: write_files(file, config, folder), file.architecture)


def _small_vector(file: GgufFile, name: str) -> npt.NDArray[np.float32]:
    """The values of an F32 vector."""
    tensor = file.tensors[name]
    if tensor.encoding != plain("F32") or len(tensor.shape) != 1 or tensor.elements > VECTOR_ELEMENTS_MAX:
        raise CheckpointError(
            f"{file.path} holds {name} as {list(tensor.shape)} of {tensor.dtype}, not a small F32 vector"
        )
    return np.fromfile(tensor.path, "<f4", tensor.elements, offset=tensor.offset_bytes)
