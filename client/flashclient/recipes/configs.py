"""Reads the values of a config.json as transformers' from_pretrained does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from flashclient.errors import ModelError
from flashclient.recipes.ffns.tiny import one_line


def read_config(values: Mapping[str, Any]) -> PreTrainedConfig:
    """transformers' configuration. Raises ModelError where its class refuses the values."""
    try:
        # JSON has no infinity: transformers writes {"__float__": "Infinity"}.
        decoded = PreTrainedConfig._decode_special_floats(dict(values))
        config: PreTrainedConfig = CONFIG_MAPPING[values["model_type"]].from_dict(decoded)
    except Exception as error:  # transformers' classes raise anything for values of unknown origin
        raise ModelError(f"config.json: {one_line(error)}") from error
    return config
