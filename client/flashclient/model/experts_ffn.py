"""The FFNs of models with experts: routed experts, shared experts, and FFNs of layers without experts.

A layer is one native call (client/native/experts/expert_step.h). Only the experts that the router has picked are read.
All FFNs of such a model are computed in this way, also those that are not mixtures: there is one kind of leasing then,
and nothing reads ahead what no router has asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashclient._native import ExpertStep, Ffn, LayerFfn, MixtureLayer, Router, Routers
from flashclient.errors import ModelError
from flashclient.kernels.arrays import array_of
from flashclient.model.experts.look_ahead import Guess, LookAhead
from flashclient.model.ffn import Biases, Clock, LayerFFN
from flashclient.source.bundle_source import BundleSource
from weightd_proto import weightd_pb2


@dataclass
class _HeldMixture:
    router: Router
    native: MixtureLayer
    guessed: tuple[int, Router] | None = None  # what it guesses next
    early: bool = False  # whether it guesses before its own attention


class ExpertsFFN:
    """See ModelFFN: computes all FFNs of a model with experts, exactly. One call at a time.

    Args:
        kernels: by layer.
        layers: of the model's record.

    Raises:
        ModelError: experts do not have whole cells.
    """

    def __init__(
        self,
        source: BundleSource,
        kernels: Sequence[Ffn],
        layers: Sequence[weightd_pb2.Layer],
        hidden_size: int,
        clock: Clock,
    ) -> None:
        self.source = source
        self.hidden_size = hidden_size
        self.clock = clock
        self.lock = threading.Lock()
        self.look_ahead = LookAhead(source, [index for index, layer in enumerate(layers) if layer.experts])
        self._natives: dict[int, LayerFfn] = {}  # by layer
        self._mixtures: dict[int, _HeldMixture] = {}
        sizes = [(max(1, layer.experts), layer.neurons) for layer in layers]
        try:
            self._step = ExpertStep(tuple(kernels), source.open_walk(), sizes)
        except ValueError as error:
            raise ModelError(f"the record of the model is damaged: {error}; import it again") from error

    def __call__(self, layer: int, x: Tensor, biases: Biases) -> Tensor:
        """The output of a layer that is not a mixture, without its output bias.

        Args:
            x: [tokens, hidden_size] fp32, contiguous.

        Returns:
            A new tensor [tokens, hidden_size] fp32.
        """
        return self._run(layer, x, None, None, biases, None)

    def picked(
        self,
        layer: int,
        x: Tensor,
        experts: Tensor,
        weights: Tensor,
        biases: Biases,
        output_bias: Tensor | None,
        guess: Callable[[], Guess | None] | None = None,
    ) -> Tensor:
        """The weighted sum over the experts that each row picks, in ascending order of the experts.

        Args:
            x: [tokens, hidden_size] fp32, contiguous.
            experts: [tokens, picks] int64, contiguous.
            weights: [tokens, picks] fp32, contiguous. A pick with weight 0, or outside of the layer's experts, is
                neither read nor computed.
            output_bias: [experts, hidden_size] fp32, contiguous, added to each expert's output.
            guess: returns what may be read early. It is called once these experts were asked for.

        Returns:
            A new tensor [tokens, hidden_size] fp32.
        """
        return self._run(layer, x, experts, weights, biases, output_bias, guess)

    def native(self, streamed: LayerFFN, rows: int) -> LayerFfn | None:
        made = self._natives.get(streamed.layer)
        if made is None:
            layer, biases, output_bias = streamed.arrays()
            made = self._natives[layer] = MixtureLayer(self._step, layer, biases, output_bias, None, None, None)
        return made

    def mixture(
        self, layer: int, biases: Biases, expert_biases: Any, routers: Routers, router: Router, rows: int
    ) -> LayerFfn:
        """What computes a mixture within a native decoder layer. Called with the lock.

        Args:
            expert_biases: an array of [experts, hidden_size] fp32, added to each expert's output.
        """
        held = self._mixtures.get(layer)
        if held is None or held.router is not router:
            native = MixtureLayer(self._step, layer, biases, None, expert_biases, routers, router)
            held = self._mixtures[layer] = _HeldMixture(router, native)
        guessed = self.look_ahead.router_after(layer, rows)
        if guessed != held.guessed:
            held.native.guess(*(guessed or (0, None)))
            held.guessed = guessed
        if (early := self.look_ahead.guesses_early(rows)) != held.early:
            held.native.guess_early(early)
            held.early = early
        return held.native

    def idle(self) -> None:
        self.source.idle()

    def _run(
        self,
        layer: int,
        x: Tensor,
        experts: Tensor | None,
        weights: Tensor | None,
        biases: Biases,
        output_bias: Tensor | None,
        guess: Callable[[], Guess | None] | None = None,
    ) -> Tensor:
        y = torch.empty_like(x)
        picks, picked_weights, bias_of_output = (
            None if tensor is None else array_of(tensor) for tensor in (experts, weights, output_bias)
        )
        with self.lock, self.source.errors:
            times = self._step.run(
                layer, picks, picked_weights, biases, bias_of_output, array_of(x), array_of(y), guess
            )
        self.clock.add(*times)
        return y
