"""The FFN of a layer, as a module that streams its bundles instead of holding its weights.

The output is a sum over neurons in placement order, taken in fp32 and rounded once. Few tokens (decode) read the
bundles where they lie; many (prefill) widen them into a block of a fixed number of neurons for dense products. In both
ways the bits depend on that order alone: not on chunks, pool, transport or threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flashclient._native import Ffn, Workers
from flashclient.absent_weights import without_gradient
from flashclient.source import BundleSource, Chunk, survive
from flashclient.torch_state import eager, plain_torch
from weightd_proto import weightd_pb2

STAGING_BYTES = 4 * 2**20  # of a block in fp32: it stays in a last-level cache between gathering and product
STAGING_NEURONS_MIN = 128  # below it the products are too thin for a matrix library

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x).square(),
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@dataclass
class Clock:
    """Where the time of forward passes went, in seconds; it only grows."""

    predict_s: float = 0.0
    acquire_s: float = 0.0  # finding out what is to be leased, and asking for it
    compute_s: float = 0.0  # on bundles
    wait_s: float = 0.0  # for bundles
    ffn_s: float = 0.0  # all of the FFNs, the four above included
    head_s: float = 0.0
    forward_s: float = 0.0  # all of the model


def staging_neurons(hidden_size: int, parts: int) -> int:
    """Neurons of a block: a function of the layout alone, as the bits depend on it; a multiple of 16."""
    neurons = STAGING_BYTES // (4 * hidden_size * parts)
    return max(STAGING_NEURONS_MIN, neurons // 16 * 16)


class NeuronSum(Protocol):
    """What an FFN is the sum of: the neurons of a layer, all or some of them."""

    source: BundleSource
    hidden_size: int
    clock: Clock

    def __call__(self, layer: int, x: Tensor, bias: NDArray[np.float32] | None) -> Tensor:
        """May be called again with the same arguments when it has raised SessionLostError."""

    def idle(self) -> None:
        """Lets go of what is leased or being fetched ahead."""


class StreamedSum:
    """What all layers of a model share: source, kernels, the staging block and the clock. One call at a time.

    Args:
        activation: one of ACTIVATIONS.
        workers: the threads of the kernels.
    """

    def __init__(
        self, source: BundleSource, bundle: weightd_pb2.BundleLayout, activation: str, workers: Workers
    ) -> None:
        self.source = source
        self.hidden_size = bundle.hidden_size
        self.gated = "gate" in bundle.parts
        self.clock = Clock()
        self._activation = ACTIVATIONS[activation]
        self.kernels = Ffn(workers, bundle.dtype, bundle.hidden_size, self.gated, activation)
        self._parts = len(bundle.parts)
        self._block: Tensor | None = None  # [parts, neurons, hidden_size] fp32, made at the first prefill
        self._lock = threading.Lock()

    def __call__(self, layer: int, x: Tensor, bias: NDArray[np.float32] | None) -> Tensor:
        """The sum over all neurons of `layer`.

        Args:
            x: [tokens, hidden_size] fp32, contiguous.
            bias: [neurons] fp32, by position, added before the activation.

        Returns:
            [tokens, hidden_size] fp32, fresh.
        """
        with self._lock:
            y = torch.zeros_like(x)
            if x.shape[0] <= Ffn.TOKENS_MAX:
                self._add_rows(layer, x, bias, y)
            else:
                self._add_blocks(layer, x, bias, y, None)
            return y

    def masked(self, layer: int, x: Tensor, bias: NDArray[np.float32] | None, wanted: Tensor) -> Tensor:
        """The sum over what each row wants, as a dense product in which the other neurons count nothing.

        Args:
            wanted: [tokens, neurons] bool, by position.
        """
        with self._lock:
            y = torch.zeros_like(x)
            self._add_blocks(layer, x, bias, y, wanted)
            return y

    def idle(self) -> None:
        self.source.idle()

    def _chunks(self, layer: int) -> Generator[Chunk, None, None]:
        """The source's chunks, with the clock running on both sides of the border."""
        with closing(self.source.chunks(layer)) as chunks:
            asked_s = time.perf_counter()
            for chunk in chunks:
                given_s = time.perf_counter()
                self.clock.wait_s += given_s - asked_s
                yield chunk
                asked_s = time.perf_counter()
                self.clock.compute_s += asked_s - given_s

    def _add_rows(self, layer: int, x: Tensor, bias: NDArray[np.float32] | None, y: Tensor) -> None:
        x_rows, y_rows = x.numpy(), y.numpy()
        with closing(self._chunks(layer)) as chunks:
            for chunk in chunks:
                of_chunk = None if bias is None else bias[chunk.first : chunk.first + len(chunk.addresses)]
                self.kernels.add_rows(chunk.addresses, of_chunk, x_rows, y_rows)

    def _add_blocks(
        self, layer: int, x: Tensor, bias: NDArray[np.float32] | None, y: Tensor, wanted: Tensor | None
    ) -> None:
        if self._block is None:
            neurons = staging_neurons(self.hidden_size, self._parts)
            self._block = torch.empty(self._parts, neurons, self.hidden_size, dtype=torch.float32, device="cpu")
        capacity, rows = self._block.shape[1], self._block.numpy()
        done = filled = 0  # neurons multiplied; neurons waiting in the block
        with closing(self._chunks(layer)) as chunks:
            for chunk in chunks:
                addresses = chunk.addresses
                while len(addresses):
                    taken = min(len(addresses), capacity - filled)
                    self.kernels.gather(addresses[:taken], filled, rows)
                    addresses, filled = addresses[taken:], filled + taken
                    if filled == capacity:
                        self._multiply(self._block, x, bias, done, y, wanted)
                        done, filled = done + filled, 0
        if filled:
            self._multiply(self._block[:, :filled], x, bias, done, y, wanted)

    def _multiply(
        self,
        block: Tensor,
        x: Tensor,
        bias: NDArray[np.float32] | None,
        first: int,
        y: Tensor,
        wanted: Tensor | None,
    ) -> None:
        """y += what the neurons in `block`, the first of them at position `first`, add."""
        fired = x @ block[0].T  # [tokens, neurons]
        if bias is not None:
            fired += torch.from_numpy(bias[first : first + block.shape[1]])
        fired = self._activation(fired)
        if self.gated:
            fired *= x @ block[1].T
        if wanted is not None:
            fired.masked_fill_(~wanted[:, first : first + block.shape[1]], 0.0)
        y.addmm_(fired, block[-1])


class StreamedFFN(torch.nn.Module):
    """One layer's FFN; takes the place of transformers' module. Its weights are absent (absent_weights.py).

    Args:
        bias: [neurons] fp32 by position, before the activation (OPT).
        output_bias: [hidden_size], added to the sum (OPT).
    """

    def __init__(
        self, total: NeuronSum, layer: int, bias: NDArray[np.float32] | None = None, output_bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self._total = total
        self._layer = layer
        self._bias = bias
        self._output_bias = None if output_bias is None else output_bias.to(torch.float32)

    @eager
    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] in any float dtype -> a fresh tensor of the same shape, in that dtype or autocast's."""
        started_s = time.perf_counter()
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        with torch.no_grad(), plain_torch():
            rows = x.detach().to(dtype).reshape(-1, self._total.hidden_size).to(torch.float32).contiguous()
            y = survive(self._total.source, lambda: self._total(self._layer, rows, self._bias))
            if self._output_bias is not None:
                y += self._output_bias
            y = y.to(dtype).view(x.shape)
        self._total.clock.ffn_s += time.perf_counter() - started_s
        return without_gradient(x, y)

    def extra_repr(self) -> str:
        return f"layer={self._layer}, hidden_size={self._total.hidden_size}"
