"""Hugging Face folders: config.json beside safetensors or torch .bin files, in one piece or sharded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from weightd.checkpoint import Checkpoint, SourceTensor, read_json
from weightd.errors import CheckpointError

CONFIG_FILE = "config.json"
# Whatever else a folder holds (other formats, model code, images) is not copied.
FILE_PATTERNS = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)

ReadTensors = Callable[[Path], dict[str, SourceTensor]]


def open_folder(folder: Path) -> Checkpoint:
    """Prefers safetensors where both kinds are there, as transformers does."""
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"no {CONFIG_FILE} in {folder}: give a Hugging Face folder or a .gguf file")
    config = read_json(folder / CONFIG_FILE)
    method = config.get("quantization_config", {}).get("quant_method")
    if method is not None:
        raise CheckpointError(f"{folder} is quantised ({method}): import the unquantised checkpoint or a .gguf file")
    return Checkpoint(folder, config, _read_tensors(folder), lambda target: copy_files(folder, target))


def copy_files(folder: Path, target: Path) -> None:
    """Config, generation config and tokenizer files, as they are."""
    for path in sorted({path for pattern in FILE_PATTERNS for path in folder.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, target / path.name)
    if (folder / "chat_templates").is_dir():
        shutil.copytree(folder / "chat_templates", target / "chat_templates")


def _read_tensors(folder: Path) -> dict[str, SourceTensor]:
    from weightd.safetensors_file import read_safetensors
    from weightd.torch_file import read_torch_file

    kinds: tuple[tuple[str, ReadTensors], ...] = (
        ("model.safetensors", read_safetensors),
        ("pytorch_model.bin", read_torch_file),
    )
    for name, read in kinds:
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder, folder / f"{name}.index.json", read)
        if (folder / name).is_file():
            return read(folder / name)
    raise CheckpointError(f"no weights in {folder}: expected model.safetensors, pytorch_model.bin or their index files")


def _read_shards(folder: Path, index: Path, read: ReadTensors) -> dict[str, SourceTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(shards)} shards are missing in {folder}, first {missing[0]}: "
            "the download is incomplete"
        )
    tensors: dict[str, SourceTensor] = {}
    for shard in shards:
        tensors.update(read(folder / shard))
    lost = sorted(weight_map.keys() - tensors.keys())
    if lost:
        raise CheckpointError(f"{index.name} promises {lost[0]} in {weight_map[lost[0]]}, but it is not there")
    return tensors
