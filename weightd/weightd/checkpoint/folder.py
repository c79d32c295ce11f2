"""Hugging Face folders: config.json beside safetensors or torch .bin files, in one piece or sharded.

If there are several weight files, transformers' rule decides (_get_resolved_checkpoint_files of modeling_utils.py):
safetensors before torch, and of each kind a single file before an index. Files of a variant (model.fp16.safetensors)
and of other formats (consolidated.safetensors) are never taken. Of an index only the names of the shards count: all
tensors in them are taken, and those that the model needs must be there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from weightd.checkpoint.checkpoint import Checkpoint, read_json
from weightd.checkpoint.model_folder import ModelFolder
from weightd.checkpoint.quantisation.formats import CONFIG, CONFIG_FILES, dequantisable, quantisation
from weightd.disk.tensors import SourceTensor
from weightd.errors import CheckpointError

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
SAFETENSORS_FILE = "model.safetensors"
TORCH_FILE = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
# Where transformers looks for weights; the first that is there counts.
WEIGHTS_FILES = tuple(f"{name}{suffix}" for name in (SAFETENSORS_FILE, TORCH_FILE) for suffix in ("", INDEX_SUFFIX))
# Files that transformers reads besides the weights. Others (other formats, code, images) are not copied.
FILE_PATTERNS = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer*.json",  # tokenizer.4.0.0.json is for versions of transformers from 4.0.0 on
    "*.model",  # sentencepiece's: tokenizer.model, spiece.model, sentencepiece.bpe.model
    "tokenizer.model.*",
    "vocab.json",
    "vocab.txt",
    "vocab-*.json",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *CONFIG_FILES,
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES_FOLDER = "additional_chat_templates"
TEMPLATE_PATTERNS = ("*.jinja",)


def open_folder(path: Path) -> Checkpoint:
    """The checkpoint in the folder at `path`.

    CheckpointError if the folder holds none, or one that is incomplete, an adapter, or quantised in an unknown format.
    """
    folder = ModelFolder(path)
    if folder.has(ADAPTER_FILE):
        raise CheckpointError(
            f"{path} holds an adapter ({ADAPTER_FILE}): merge it into its model with peft's merge_and_unload(), and "
            "import that"
        )
    if not folder.has(CONFIG_FILE):
        instead = "one of the folders in its snapshots/" if (path / "snapshots").is_dir() else "a Hugging Face folder"
        raise CheckpointError(f"no {CONFIG_FILE} in {path}: give {instead} or a .gguf file{_unfinished(folder)}")
    config = read_json(folder.file(CONFIG_FILE))
    configuration = configuration_name(config)
    if configuration != CONFIG_FILE:
        config = read_json(folder.file(configuration))
    config = with_quantisation(folder, config)
    quantisation(path, config)  # refuses before the weights are looked for
    tensors, notes = dequantisable(path, config, _read_tensors(folder, config.get("transformers_weights")))
    return Checkpoint(path, config, tensors, lambda target: copy_files(folder, target, configuration), notes=notes)


def with_quantisation(folder: ModelFolder, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with its quantization_config, which may lie in the text part's or in a file of its own."""
    text = config.get("text_config")
    if CONFIG not in config and isinstance(text, dict) and CONFIG in text:
        return config | {CONFIG: text[CONFIG], "text_config": {key: text[key] for key in text if key != CONFIG}}
    for name, method in CONFIG_FILES.items():
        if CONFIG not in config and folder.has(name):
            return config | {CONFIG: {"quant_method": method} | read_json(folder.file(name))}
    return config


def configuration_name(config: Mapping[str, Any]) -> str:
    """The file that holds the configuration for the installed transformers, which config.json may name.

    As transformers' get_configuration_file(): the last, in the order of their names, before the first that is too new.
    """
    named = config.get("configuration_files")
    names = named if isinstance(named, list) else []
    versions = {
        name.removeprefix("config.").removesuffix(".json"): name
        for name in names
        if isinstance(name, str) and name.startswith("config.") and name.endswith(".json") and name != CONFIG_FILE
    }
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        return CONFIG_FILE
    from packaging.version import InvalidVersion, Version  # transformers needs it, too

    chosen = CONFIG_FILE
    for written in sorted(versions):
        try:
            if Version(written) > Version(installed):
                break
        except InvalidVersion as error:
            raise CheckpointError(f"{CONFIG_FILE} names {versions[written]}, which is of no version") from error
        chosen = versions[written]
    return chosen


def copy_files(folder: ModelFolder, target: Path, configuration: str = CONFIG_FILE) -> None:
    """Copies config, generation config, tokenizer files and chat templates, unchanged.

    Args:
        configuration: the file that becomes config.json.
    """
    names = folder.matching(FILE_PATTERNS) + folder.matching(TEMPLATE_PATTERNS, TEMPLATES_FOLDER)
    for name in names:
        copy = target / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(folder.file(configuration if name == CONFIG_FILE else name), copy)


def _read_tensors(folder: ModelFolder, named: Any) -> dict[str, SourceTensor]:
    """`named`: the weights file that config.json names, if it names one."""
    if named is not None:
        if not isinstance(named, str) or not named.endswith((".safetensors", f".safetensors{INDEX_SUFFIX}")):
            raise CheckpointError(
                f"{folder.path} has transformers_weights = {named!r}, which is not a safetensors file"
            )
        return _read_weights(folder, named)
    found = next(filter(folder.has, WEIGHTS_FILES), None)
    if found is not None:
        return _read_weights(folder, found)
    others = folder.matching(("*.safetensors", "*.bin", "*.pth", "*.pt", "*.msgpack", "*.h5"))
    raise CheckpointError(
        f"no weights in {folder.path}: expected {SAFETENSORS_FILE}, {TORCH_FILE} or their index files"
        + (f", and transformers does not look at {', '.join(others[:5])}" if others else "")
        + _unfinished(folder)
    )


def _read_weights(folder: ModelFolder, name: str) -> dict[str, SourceTensor]:
    if name.endswith(INDEX_SUFFIX):
        return _read_shards(folder, name, _reader(name.removesuffix(INDEX_SUFFIX)))
    return _reader(name)(folder.file(name))


def _reader(name: str) -> Callable[[Path], dict[str, SourceTensor]]:
    from weightd.checkpoint.torch_file import read_torch_file
    from weightd.disk.safetensors_file import read_safetensors

    return read_safetensors if name.endswith(".safetensors") else read_torch_file


def _read_shards(
    folder: ModelFolder, index: str, read: Callable[[Path], dict[str, SourceTensor]]
) -> dict[str, SourceTensor]:
    weight_map = read_json(folder.file(index)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder.path / index} has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{folder.path / index} says that {name} is in {shard!r}, which is not a file name")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not folder.has(shard)]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(shards)} shards are missing in {folder.path}, first {missing[0]!r}: "
            f"the download is incomplete{_unfinished(folder)}"
        )
    tensors: dict[str, SourceTensor] = {}
    for shard in shards:  # if several shards hold a name, the last one counts, as in transformers
        tensors.update(read(folder.file(shard)))
    return tensors


def has_weights(folder: ModelFolder, config: Mapping[str, Any] | None = None) -> bool:
    """Whether the folder holds weights under the name that its configuration gives, or that transformers looks for."""
    named = None if config is None else config.get("transformers_weights")
    names = WEIGHTS_FILES if named is None else (named,)
    return any(isinstance(name, str) and folder.has(name) for name in names)


def _unfinished(folder: ModelFolder) -> str:
    """What an interrupted download has left behind, as the end of an error."""
    left = folder.unfinished()
    return f"; {left} unfinished files (*.incomplete) lie there: run the download again" if left else ""
