"""Tiny models whose neurons fire seldom, of known structure, and text to calibrate them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import make_config, make_model
from torch import Tensor
from transformers import PreTrainedModel

from flashclient.architectures import architecture_of

RELU = {"opt": {}, "gemma3": {"hidden_activation": "relu"}}  # what makes a family's config one of ReLU


def make_sparse_model(family: str = "opt", rank: int = 4, dtype: str = "float32", seed: int = 0) -> PreTrainedModel:
    """A ReLU model whose deciding rows have rank `rank` and fire for about a tenth of the tokens.

    Rows of one sign beside a constant coordinate stand for a bias where the family has none.
    """
    changes = RELU.get(family, {"hidden_act": "relu"})
    config: Any = make_config(family)
    config.update(changes)
    model = make_model(config, dtype, seed)
    architecture = architecture_of(model.config)[1]
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(architecture.weights[0]):
            neurons, hidden = parameter.shape
            first, second = torch.randn(rank, hidden, generator=random), torch.randn(neurons, rank, generator=random)
            with torch.no_grad():
                parameter.copy_(second @ first / hidden**0.5)
        if architecture.bias is not None and name.endswith(architecture.bias):
            with torch.no_grad():
                parameter.copy_(-1.5 * rank**0.5 + 0.3 * torch.randn(parameter.shape, generator=random))
    return model


def write_text(path: Path, characters: int, seed: int = 0) -> Path:
    """Made-up words in sentences; with checkpoints.make_tokenizer nearly a token per character."""
    random = np.random.default_rng(seed)
    words = ["".join(random.choice(list("etaoinshrdlu"), size)) for size in random.integers(2, 9, 200)]
    text = ""
    while len(text) < characters:
        text += " ".join(random.choice(words, 8)) + ".\n"
    path.write_text(text[:characters])
    return path


def deciding_module(model: PreTrainedModel, ffn: str) -> torch.nn.Module:
    """The linear layer whose output decides whether a neuron fires."""
    name = architecture_of(model.config)[1].weights[0].removesuffix(".weight")
    return model.get_submodule(f"{ffn}.{name}")


def loss_of(model: PreTrainedModel, sequences: Tensor) -> float:
    """transformers' own mean of the losses of `sequences`."""
    with torch.no_grad():
        return float(np.mean([model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in sequences]))
