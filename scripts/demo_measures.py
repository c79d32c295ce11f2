"""What the demo models' cards tell, measured on held-out text: perplexity, sparsity, agreement of draft and model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import OPTForCausalLM

CONTEXT_TOKENS = 512
ROWS_AT_ONCE = 4


def windows(tokens: Tensor) -> Tensor:
    """Whole windows [rows, CONTEXT_TOKENS] of tokens [n]; what is left over at the end is not measured."""
    return tokens[: len(tokens) // CONTEXT_TOKENS * CONTEXT_TOKENS].view(-1, CONTEXT_TOKENS).long()


@torch.no_grad()
def perplexity(model: OPTForCausalLM, rows: Tensor) -> float:
    """exp of the mean loss over every token of rows [n, tokens] but each row's first."""
    loss = torch.zeros((), dtype=torch.float64)
    for some in torch.split(rows, ROWS_AT_ONCE):
        logits = model(input_ids=some, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss += functional.cross_entropy(logits.float(), some[:, 1:].flatten(), reduction="sum")
    return math.exp(float(loss) / (rows.numel() - len(rows)))


@torch.no_grad()
def firing_shares(model: OPTForCausalLM, rows: Tensor) -> list[float]:
    """Per layer the share of (neuron, token) pairs with an activation above zero."""
    fired = [0] * len(model.model.decoder.layers)

    def count(index: int, activations: Tensor) -> None:
        fired[index] += int((activations > 0).sum())

    hooks: list[Any] = [
        layer.fc2.register_forward_pre_hook(lambda _, inputs, index=index: count(index, inputs[0]))
        for index, layer in enumerate(model.model.decoder.layers)
    ]
    for some in torch.split(rows, ROWS_AT_ONCE):
        model(input_ids=some, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [count / (rows.numel() * model.config.ffn_dim) for count in fired]


@torch.no_grad()
def agreement(model: OPTForCausalLM, draft: OPTForCausalLM, rows: Tensor) -> float:
    """The share of tokens for which both find the same next token likeliest."""
    agreed = 0
    for some in torch.split(rows, ROWS_AT_ONCE):
        wanted, proposed = (each(input_ids=some, use_cache=False).logits.argmax(-1) for each in (model, draft))
        agreed += int((wanted == proposed).sum())
    return agreed / rows.numel()
