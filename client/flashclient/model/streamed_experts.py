"""The experts of a layer, as a module that streams their bundles instead of holding their weights."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from flashclient.model.absent_weights import HoldsAbsentWeights, without_gradient
from flashclient.model.experts_ffn import ExpertsFFN
from flashclient.model.ffn import Biases
from flashclient.source.bundle_source import retry_on_loss
from flashclient.torch_state import eager, plain_torch


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one mixture, with the interface that transformers gives them (integrations/moe.py).

    Attributes:
        biases: of gate and up rows, before the activation (gpt-oss).
        output_bias: [experts, hidden_size] fp32, added to an expert's output before it is weighted (gpt-oss).
    """

    ffn: ExpertsFFN
    layer: int
    experts: int
    biases: Biases = None
    output_bias: Tensor | None = None

    def __call__(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """[..., hidden_size] in any float dtype -> a new tensor of the same shape, in that dtype or in autocast's.

        Args:
            hidden_states: alone (Llama 4) [experts * tokens, hidden_size], the rows of expert e from e * tokens on. The
                result is then each row's output; rows of zeros stay zeros, and are not computed.
            top_k_index: [..., picks], any integers. Some routers mask a pick by an index beyond the last expert.
            top_k_weights: [..., picks], any floats.
        """
        started_s = time.perf_counter()
        ffn = self.ffn
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype
        with torch.no_grad(), plain_torch():
            rows = hidden_states.detach().to(dtype).reshape(-1, ffn.hidden_size).to(torch.float32).contiguous()
            if top_k_index is None or top_k_weights is None:
                picks = (torch.arange(len(rows), device="cpu") * self.experts // len(rows)).unsqueeze(1)
                weights = rows.any(dim=1, keepdim=True).to(torch.float32)
            else:
                picks = top_k_index.reshape(-1, top_k_index.shape[-1]).to(torch.int64).contiguous()
                weights = top_k_weights.detach().reshape(picks.shape).to(torch.float32).contiguous()
            y = retry_on_loss(
                ffn.source, lambda: ffn.picked(self.layer, rows, picks, weights, self.biases, self.output_bias)
            )
            y = y.to(dtype).view(hidden_states.shape)
        ffn.clock.ffn_s += time.perf_counter() - started_s
        return without_gradient(hidden_states, y)


class StreamedExperts(HoldsAbsentWeights):
    """A module with transformers' interface of experts, whose own forward is not called."""

    streamed: LayerExperts

    @eager
    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """See LayerExperts."""
        return self.streamed(hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        return f"layer={self.streamed.layer}, hidden_size={self.streamed.ffn.hidden_size}"
