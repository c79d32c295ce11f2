"""The folder of an adapter: what can be said of it before a model is loaded, without torch."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from flashclient.errors import FlashClientError, OptionError

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
KIND = "LORA"


def require_peft() -> None:
    """Raises FlashClientError where PEFT is not installed."""
    if find_spec("peft") is None:
        raise FlashClientError("this needs peft: pip install 'weightd[adapters]'")


def require_adapter(name: str, folder: Path) -> None:
    """Raises OptionError where `folder` holds no LoRA adapter as PEFT writes them."""
    if not (folder / CONFIG_FILE).is_file():
        raise OptionError(f"adapter '{name}': {folder} has no {CONFIG_FILE}: give the folder of an adapter of PEFT")
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"adapter '{name}': {folder / CONFIG_FILE} cannot be read: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != KIND:
        raise OptionError(f"adapter '{name}' is of type {kind!r}, and the server takes {KIND} of PEFT only")
    if not any((folder / file).is_file() for file in WEIGHT_FILES):
        raise OptionError(f"adapter '{name}': {folder} has no {WEIGHT_FILES[0]}: give the whole folder of the adapter")
