"""The FFN of a layer, as a module that streams its bundles instead of holding its weights.

The output is a sum over neurons in placement order, computed in fp32 and rounded once; bundles are read in place. The
bits of a row depend on that order and on the row alone: not on the other rows, chunks, pool, transport or threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashclient._native import ExactLayer, Ffn, FfnSum, LayerFfn
from flashclient.kernels.arrays import array_of
from flashclient.model.absent_weights import without_gradient
from flashclient.source.bundle_source import BundleSource, Chunk, retry_on_loss
from flashclient.torch_state import eager, plain_torch

# Added to the products before the activation, by position: [1, neurons] of up, or [2, neurons] of gate and up, fp32.
Biases = NDArray[np.float32] | None
Times = tuple[float, float, float, float]  # seconds: predict, acquire, compute, wait


@dataclass
class Clock:
    """The time that the parts of forward passes took, in seconds, since the model was built."""

    predict_s: float = 0.0
    acquire_s: float = 0.0  # moving the window, and asking for cells
    compute_s: float = 0.0  # kernels on bundles
    wait_s: float = 0.0  # for bundles
    ffn_s: float = 0.0  # the FFNs, including the four parts above
    head_s: float = 0.0
    forward_s: float = 0.0  # the whole model

    def __post_init__(self) -> None:
        self.layer_waits_s: dict[int, float] = {}  # for bundles, by layer

    def add_wait(self, layer: int, wait_s: float) -> None:
        """Notes which layer has waited."""
        self.layer_waits_s[layer] = self.layer_waits_s.get(layer, 0.0) + wait_s

    def add(self, predict_s: float = 0, acquire_s: float = 0, compute_s: float = 0, wait_s: float = 0) -> None:
        """Adds the parts of an FFN's time."""
        self.predict_s += predict_s
        self.acquire_s += acquire_s
        self.compute_s += compute_s
        self.wait_s += wait_s


class RowAdapter(Protocol):
    """What an adapter adds within the FFN of one layer; see flashclient.batching.ffn_adapter."""

    def row_biases(self, x: Tensor) -> NDArray[np.float32] | None: ...

    def room_for_h(self, rows: int) -> NDArray[np.float32] | None: ...

    def output_of(self, h: NDArray[np.float32]) -> Tensor: ...


class ModelFFN(Protocol):
    """Computes the FFN of any layer of a model, from all of its neurons or some."""

    source: BundleSource
    hidden_size: int
    clock: Clock
    lock: threading.Lock  # held while it computes

    def __call__(self, layer: int, x: Tensor, biases: Biases) -> Tensor:
        """The FFN's output for x [tokens, hidden_size], without its output bias.

        After a SessionLostError it may be called again with the same arguments.
        """

    def native(self, streamed: LayerFFN, rows: int) -> LayerFfn | None:
        """What computes the FFN of a layer, with its output bias, within a native decoder layer.

        Called with the lock. None: nothing does for so many rows; the FFN must be called.
        """

    def idle(self) -> None:
        """Gives back everything that is leased or being fetched ahead."""


class ExactFFN:
    """See ModelFFN: sums over all neurons, which are streamed. One call at a time.

    Args:
        kernels: by layer.

    Attributes:
        adapters: of the steps to come, by layer.
    """

    def __init__(self, source: BundleSource, kernels: Sequence[Ffn], hidden_size: int, clock: Clock) -> None:
        self.source = source
        self.hidden_size = hidden_size
        self.clock = clock
        self.lock = threading.Lock()
        self.adapters: Mapping[int, RowAdapter] = {}
        self._kernels = kernels
        self._natives: dict[int, ExactLayer] = {}  # by layer

    def __call__(
        self,
        layer: int,
        x: Tensor,
        biases: Biases,
        row_masks: NDArray[np.uint16] | None = None,
    ) -> Tensor:
        """The sum over all neurons of `layer`, or over those that each row wants.

        Args:
            x: [tokens, hidden_size] fp32, contiguous.
            row_masks: [ceil(tokens / 16), neurons], by position: bit t of group g, row 16 * g + t wants the neuron.

        Returns:
            A new tensor [tokens, hidden_size] fp32.
        """
        with self.lock:
            y = torch.zeros_like(x)
            x_rows, y_rows = x.numpy(), y.numpy()
            kernels = self._kernels[layer]
            every_neuron = FfnSum(kernels, x_rows, y_rows) if row_masks is None else None
            adapter = self.adapters.get(layer)
            row_biases, h = (None, None) if adapter is None else (adapter.row_biases(x), adapter.room_for_h(len(x)))
            with closing(self._chunks(layer)) as chunks:
                for chunk in chunks:
                    part = slice(chunk.first * kernels.neurons, (chunk.first + len(chunk.addresses)) * kernels.neurons)
                    biases_part = None if biases is None else biases[:, part]
                    if every_neuron is not None:
                        row_biases_part = None if row_biases is None else row_biases[:, :, part]
                        h_part = None if h is None else h[:, part]
                        every_neuron.add(chunk.addresses, biases_part, row_biases_part, h_part)
                    elif row_masks is not None:
                        kernels.add_rows(chunk.addresses, biases_part, row_masks[:, part], x_rows, y_rows)
            if every_neuron is not None:
                every_neuron.finish()
            if adapter is not None and h is not None:
                y += adapter.output_of(h)
            return y

    def native(self, streamed: LayerFFN, rows: int) -> LayerFfn | None:
        sweep = None if streamed.layer in self.adapters else self.source.sweep()
        if sweep is None:
            return None
        made = self._natives.get(streamed.layer)
        if made is None:
            made = self._natives[streamed.layer] = ExactLayer(self._kernels[streamed.layer], sweep, *streamed.arrays())
        return made

    def idle(self) -> None:
        self.source.idle()

    def _chunks(self, layer: int) -> Generator[Chunk, None, None]:
        """The source's chunks. Measures the time until each arrives, and the time that the caller computes on it."""
        with closing(self.source.chunks(layer)) as chunks:
            asked_s = time.perf_counter()
            for chunk in chunks:
                given_s = time.perf_counter()
                self.clock.add(wait_s=given_s - asked_s)
                yield chunk
                asked_s = time.perf_counter()
                self.clock.add(compute_s=asked_s - given_s)


def by_rows(ffn: ModelFFN, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """What a module that streams returns for x [..., hidden_size], in any float dtype.

    Args:
        compute: is called with x as the kernels take it, [rows, hidden_size] fp32, and returns as much.

    Returns:
        A new tensor of the shape of x, in its dtype or in autocast's.
    """
    started_s = time.perf_counter()
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    with torch.no_grad(), plain_torch():
        rows = x.detach().to(dtype).reshape(-1, ffn.hidden_size).to(torch.float32).contiguous()
        y = compute(rows).to(dtype).view(x.shape)
    ffn.clock.ffn_s += time.perf_counter() - started_s
    return without_gradient(x, y)


def within(ffn: ModelFFN, layers: Sequence[int], compute: Callable[[], Sequence[Times]]) -> None:
    """Calls `compute`, native decoder layers with native FFNs of `ffn`; again after each loss of weightd.

    Args:
        layers: whose FFNs are computed.
        compute: returns for each the seconds that it took for predicting, acquiring, computing and waiting.
    """

    def attempt() -> Sequence[Times]:
        with ffn.lock, ffn.source.errors:
            return compute()

    by_layer = retry_on_loss(ffn.source, attempt)
    sums = [sum(one) for one in zip(*by_layer, strict=True)]
    ffn.clock.add(*sums)
    ffn.clock.ffn_s += sum(sums)
    for layer, times in zip(layers, by_layer, strict=True):
        ffn.clock.add_wait(layer, times[-1])


@dataclass(frozen=True)
class LayerFFN:
    """The FFN of one layer, of `output_bias` [hidden_size] fp32 or None."""

    ffn: ModelFFN
    layer: int
    biases: Biases = None
    output_bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """See by_rows()."""
        return by_rows(self.ffn, x, self._of_rows)

    def of_rows(self, rows: Tensor) -> Tensor:
        """The FFN's output for rows [tokens, hidden_size] fp32, contiguous: as much, which is not rounded."""
        started_s = time.perf_counter()
        with torch.no_grad():
            y = self._of_rows(rows)
        self.ffn.clock.ffn_s += time.perf_counter() - started_s
        return y

    def native(self, rows: int) -> LayerFfn | None:
        """What computes the FFN within a native decoder layer. None: the FFN of so many rows must be called."""
        with self.ffn.lock:
            return self.ffn.native(self, rows)

    def within(self, layers: Sequence[int], compute: Callable[[], Sequence[Times]]) -> None:
        """See within()."""
        within(self.ffn, layers, compute)

    def arrays(self) -> tuple[int, Biases, Any]:
        """What a LayerFfn is made of, beside the FFN."""
        return self.layer, self.biases, None if self.output_bias is None else array_of(self.output_bias)

    def _of_rows(self, rows: Tensor) -> Tensor:
        before_s = self.ffn.clock.wait_s
        y = retry_on_loss(self.ffn.source, lambda: self.ffn(self.layer, rows, self.biases))
        self.ffn.clock.add_wait(self.layer, self.ffn.clock.wait_s - before_s)
        if self.output_bias is not None:
            y += self.output_bias
        return y


class StreamedFFN(torch.nn.Module):
    """A module that is called with an FFN's input and returns its output, without the weights.

    Transformers' modules become one (absent_weights.become()). Their own forward is not called.
    """

    streamed: LayerFFN

    @eager
    def forward(self, x: Tensor) -> Tensor:
        """See LayerFFN."""
        return self.streamed(x)

    def extra_repr(self) -> str:
        return f"layer={self.streamed.layer}, hidden_size={self.streamed.ffn.hidden_size}"


def streamed_ffn(streamed: LayerFFN) -> StreamedFFN:
    """A module that is nothing but `streamed`."""
    module = StreamedFFN()
    module.streamed = streamed
    return module
