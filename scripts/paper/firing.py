"""Checks that neurons fired as planned in the tokens that were timed.

While a row runs, the inputs of the FFNs are copied (some kilobytes per layer). Afterwards they are multiplied with the
checkpoint's own matrices. So the check does not depend on how the client predicts, reads or computes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from make_planted_model import LAYER_NAME, PLANTED_FOLDER
from planted.calibration import planted_predictor, read_plan
from planted.shares import WINDOW, Shares, shares_of
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import flashclient
from flashclient.calibration.predictor_training import ReferencePredictor
from flashclient.model.install import streamed_ffns
from flashclient.model.predictor_file import UNION_TOKENS_MAX

TOLERANCE = 0.1  # of the plan


class InputTap:
    """Keeps the input of every FFN for each decoded token: [hidden_size] in the model's dtype."""

    def __init__(self, client: flashclient.FlashClient) -> None:
        self._rows: list[list[Tensor]] = [[] for _ in client.record.layers]
        for rows, ffn in zip(self._rows, streamed_ffns(client.model), strict=True):
            ffn.register_forward_pre_hook(lambda _, given, rows=rows: self._keep(rows, given[0]))

    @staticmethod
    def _keep(rows: list[Tensor], x: Tensor) -> None:
        if x.numel() == x.shape[-1]:  # one token, so not the prompt
            rows.append(x.detach().clone().view(-1))

    def inputs(self) -> list[Tensor]:
        """Of each layer: [tokens, hidden_size]."""
        return [torch.stack(rows) for rows in self._rows if len(rows) > UNION_TOKENS_MAX]


def compare(checkpoint: Path, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """Each layer's shares, and how many layers lie within a tenth of their plan. Empty for too few tokens."""
    plan = read_plan(checkpoint)
    if len(inputs) < len(plan["layers"]):
        return {}
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    layers = []
    for number, (x, told) in enumerate(zip(inputs, plan["layers"], strict=True)):
        prefix = f"{LAYER_NAME[plan['shape']['family']]}.{number}"
        shares = _shares(x.float(), checkpoint, index, prefix, number)
        layers.append(asdict(shares) | {"as_planned": as_planned(shares, told["planned"])})
    return {"layers": layers, "as_planned_share": sum(layer["as_planned"] for layer in layers) / len(layers)}


def as_planned(shares: Shares, planned: Mapping[str, float]) -> bool:
    """Whether what fires, what is predicted and the union of four tokens are within a tenth of the plan."""
    measured = {"firing": shares.firing, "predicted": shares.predicted, "union_4": shares.union[WINDOW - 1]}
    return all(abs(value / planned[name] - 1) <= TOLERANCE for name, value in measured.items())


def _shares(x: Tensor, checkpoint: Path, index: Mapping[str, str], prefix: str, number: int) -> Shares:
    planted = load_file(checkpoint / PLANTED_FOLDER / f"layer-{number:03}.safetensors")
    wanted = ReferencePredictor(planted_predictor(planted), planted["input"].dtype).wanted(x)
    with ExitStack() as opened:

        def tensor(name: str) -> Tensor:
            file: Any = opened.enter_context(safe_open(checkpoint / index[name], "pt"))
            weight: Tensor = file.get_tensor(name)
            return weight.float()

        if f"{prefix}.fc1.weight" in index:
            fired = x @ tensor(f"{prefix}.fc1.weight").T + tensor(f"{prefix}.fc1.bias")
        else:
            fired = x @ tensor(f"{prefix}.mlp.gate_proj.weight").T
    return shares_of((fired > 0).numpy(), wanted.numpy())
