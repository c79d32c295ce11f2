"""Opens a checkpoint of any kind."""

from __future__ import annotations

from pathlib import Path

from weightd.checkpoint.checkpoint import Checkpoint
from weightd.checkpoint.folder import CONFIG_FILE, open_folder
from weightd.checkpoint.gguf import open_gguf
from weightd.checkpoint.model_folder import ModelFolder
from weightd.errors import CheckpointError


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a Hugging Face folder, a .gguf file, or a folder with exactly one .gguf file.

    Reads headers only. CheckpointError if the checkpoint is missing, incomplete or of an unknown kind.
    """
    check_exists(path)
    if path.is_file():
        return open_gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a file nor a folder: give a Hugging Face folder or a .gguf file")
    folder = ModelFolder(path)
    gguf_files = folder.matching(("*.gguf",))
    if not folder.has(CONFIG_FILE) and len(gguf_files) == 1:
        return open_gguf(folder.file(gguf_files[0]))
    return open_folder(path)


def check_exists(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: give a Hugging Face folder or a .gguf file")
