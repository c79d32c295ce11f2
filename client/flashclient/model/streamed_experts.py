"""The experts of a layer, as a module that streams their bundles instead of holding their weights."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from flashclient.model.absent_weights import HoldsAbsentWeights, without_gradient
from flashclient.model.ffn import Biases, ExactFFN
from flashclient.source.border import retry_on_loss
from flashclient.torch_state import eager, plain_torch


class StreamedExperts(HoldsAbsentWeights):
    """A module of transformers' experts interface, whose own forward is not called.

    Attributes:
        ffn: streams the bundles of all layers.
        layer: of the record.
        experts: their number.
        width: the neurons of each.
        biases: by position, all experts'.
        output_biases: [experts, hidden_size] fp32, or None.
    """

    ffn: ExactFFN
    layer: int
    experts: int
    width: int
    biases: Biases
    output_biases: Tensor | None

    @eager
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: [tokens, hidden_size].
            top_k_index, top_k_weights: [tokens, k], the experts of each token. Others than there are count nothing.

        Returns:
            A new tensor [tokens, hidden_size]. A row is summed over its experts in rising order, in fp32.
        """
        started_s = time.perf_counter()
        with torch.no_grad(), plain_torch():
            rows = hidden_states.detach().to(torch.float32).contiguous()
            y = retry_on_loss(self.ffn.source, lambda: self._sum(rows, top_k_index, top_k_weights.to(torch.float32)))
            y = y.to(hidden_states.dtype)
        self.ffn.clock.ffn_s += time.perf_counter() - started_s
        return without_gradient(hidden_states, y)

    def _sum(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        tokens_of = [(chosen == expert).nonzero(as_tuple=True) for expert in range(self.experts)]
        inputs = [x[tokens] for tokens, _ in tokens_of]
        outputs = self.ffn.each_expert(self.layer, self.width, inputs, self.biases)
        y = torch.zeros_like(x)
        for expert, ((tokens, choices), output) in enumerate(zip(tokens_of, outputs, strict=True)):
            if self.output_biases is not None:
                output += self.output_biases[expert]
            y[tokens] += output * weights[tokens, choices, None]
        return y
