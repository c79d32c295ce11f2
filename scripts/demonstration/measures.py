"""The measurements in the demo models' cards, on held-out text: perplexity, sparsity, agreement of draft and model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import OPTForCausalLM

CONTEXT_TOKENS = 512
ROWS_AT_ONCE = 4


@dataclass(frozen=True)
class Measures:
    """The measurements of one model on some rows [n, tokens].

    Attributes:
        perplexity: exp of the mean loss over every token but each row's first.
        firing: per layer the share of (neuron, token) pairs with an activation above zero.
        likeliest: [n, tokens], the next token that the model finds likeliest.
    """

    perplexity: float
    firing: list[float]
    likeliest: Tensor

    def agreement(self, other: Measures) -> float:
        """The share of tokens for which both models find the same next token likeliest."""
        return float((self.likeliest == other.likeliest).float().mean())


def windows(tokens: Tensor) -> Tensor:
    """Whole windows [rows, CONTEXT_TOKENS] of tokens [n]; what is left over at the end is not measured."""
    return tokens[: len(tokens) // CONTEXT_TOKENS * CONTEXT_TOKENS].view(-1, CONTEXT_TOKENS).long()


@torch.no_grad()
def measure(model: OPTForCausalLM, rows: Tensor) -> Measures:
    """One pass of `model` over rows [n, tokens]."""
    fired = [0] * len(model.model.decoder.layers)

    def count(index: int, activations: Tensor) -> None:
        fired[index] += int((activations > 0).sum())

    hooks: list[Any] = [
        layer.fc2.register_forward_pre_hook(lambda _, inputs, index=index: count(index, inputs[0]))
        for index, layer in enumerate(model.model.decoder.layers)
    ]
    loss, likeliest = 0.0, []
    for some in torch.split(rows, ROWS_AT_ONCE):
        logits = model(input_ids=some, use_cache=False).logits
        likeliest.append(logits.argmax(-1))
        losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), some[:, 1:].flatten(), reduction="sum")
        loss += float(losses)
    for hook in hooks:
        hook.remove()
    firing = [count / (rows.numel() * model.config.ffn_dim) for count in fired]
    return Measures(math.exp(loss / (rows.numel() - len(rows))), firing, torch.cat(likeliest))
