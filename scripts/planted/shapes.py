"""The tensors of a checkpoint, by its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


def checkpoint_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of transformers' model of a configuration, without tied weights."""
    with torch.device("meta"):
        made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        model = AutoModelForCausalLM.from_config(made)  # type: ignore[no-untyped-call]
    tied = model.all_tied_weights_keys
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
