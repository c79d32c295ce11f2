"""The experts of a layer, as a module that streams their bundles instead of holding their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flashclient._native import LayerFfn, Router, Routers
from flashclient.kernels.arrays import array_of
from flashclient.model.absent_weights import HoldsAbsentWeights
from flashclient.model.experts_ffn import ExpertsFFN
from flashclient.model.ffn import Biases, Times, by_rows, within
from flashclient.source.bundle_source import retry_on_loss
from flashclient.torch_state import eager


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
        """See by_rows(), of x = hidden_states.

        Args:
            hidden_states: alone (Llama 4) [experts * tokens, hidden_size], the rows of expert e from e * tokens on. The
                result is then each row's output; rows of zeros stay zeros, and are not computed.
            top_k_index: [..., picks], any integers. Some routers mask a pick by an index beyond the last expert.
            top_k_weights: [..., picks], any floats.
        """
        guess = partial(self.ffn.look_ahead.guess, self.layer, hidden_states) if top_k_index is not None else None

        def of_rows(rows: Tensor) -> Tensor:
            if top_k_index is None or top_k_weights is None:
                picks = (torch.arange(len(rows), device="cpu") * self.experts // len(rows)).unsqueeze(1)
                weights = rows.any(dim=1, keepdim=True).to(torch.float32)
            else:
                picks = top_k_index.reshape(-1, top_k_index.shape[-1]).to(torch.int64).contiguous()
                weights = top_k_weights.detach().reshape(picks.shape).to(torch.float32).contiguous()
            return retry_on_loss(
                self.ffn.source,
                lambda: self.ffn.picked(self.layer, rows, picks, weights, self.biases, self.output_bias, guess),
            )

        return by_rows(self.ffn, hidden_states, of_rows)

    def routed(self, routers: Routers, router: Router) -> RoutedExperts:
        """The experts with the router that picks them."""
        return RoutedExperts(self, routers, router)


@dataclass(frozen=True)
class RoutedExperts:
    """A mixture as a native decoder layer computes it."""

    experts: LayerExperts
    routers: Routers
    router: Router

    @property
    def layer(self) -> int:
        return self.experts.layer

    def native(self, rows: int) -> LayerFfn:
        """What computes the experts within a native decoder layer."""
        ffn, layer, biases = self.experts.ffn, self.experts.layer, self.experts.biases
        output_bias = None if self.experts.output_bias is None else array_of(self.experts.output_bias)
        with ffn.lock:
            return ffn.mixture(layer, biases, output_bias, self.routers, self.router, rows)

    def within(self, layers: Sequence[int], compute: Callable[[], Sequence[Times]]) -> None:
        """See within()."""
        within(self.experts.ffn, layers, compute)


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
