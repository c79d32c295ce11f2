"""Runs a model one decoder layer at a time over any number of sequences, so that each layer is read from flash once.

What it holds is one layer's FFN in fp32; the sequences' hidden states are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flashclient._native import copy_bundles
from flashclient.client import FlashClient
from flashclient.model.activations import torch_activation
from flashclient.model.architectures import architecture_of, install
from flashclient.model.build import resident_tensors
from flashclient.model.dtypes import DTYPES
from flashclient.source.border import BundleSource, retry_on_loss
from weightd_proto import weightd_pb2
from weightd_proto.encodings import part_bytes

FeedForward = Callable[[Tensor], Tensor]  # [tokens, hidden_size] fp32 -> the same


@dataclass(frozen=True)
class LayerWeights:
    """One layer's FFN in fp32, rows by position. What an FFN computes here is the reference of the kernels' work.

    Attributes:
        rows: [gate,] up, each [neurons, hidden_size].
        down: [neurons, hidden_size].
        bias: [neurons] or None; output_bias: [hidden_size] or None.
    """

    rows: list[Tensor]
    down: Tensor
    bias: Tensor | None
    output_bias: Tensor | None
    activation: Callable[[Tensor], Tensor]

    def neurons(self, x: Tensor) -> Tensor:
        """What the neurons put out for x [tokens, hidden_size]: [tokens, neurons]. One fires where this is not 0."""
        first = x @ self.rows[0].T
        if self.bias is not None:
            first += self.bias
        fired = self.activation(first)
        return fired if len(self.rows) == 1 else fired * (x @ self.rows[1].T)

    def sum(self, fired: Tensor) -> Tensor:
        """The FFN's output for the neurons' outputs `fired`: [tokens, hidden_size]."""
        total = fired @ self.down
        return total if self.output_bias is None else total + self.output_bias


class LayerWalk:
    """The model of `client`, taken over: its own forward must not be used afterwards.

    Args:
        example: [1, length] ids; every sequence has this length.
    """

    def __init__(self, client: FlashClient, example: Tensor) -> None:
        self._model: Any = client.model
        self.record = client.record
        self._client = client
        self._architecture = architecture_of(self._model.config)[1]
        self._activation = torch_activation(client.activation)
        dtype = DTYPES[self.record.compute_dtype]
        self._tensors = resident_tensors(self.record, client.source.resident, dtype)
        self._layers = [_decoder_layer(self._model, layer.module) for layer in self.record.layers]
        self._ffn = _PassedFFN()
        for layer in self.record.layers:
            install(self._model, layer.module, self._architecture, self._ffn)
        self._calls = self._record_calls(example)

    def _record_calls(self, example: Tensor) -> list[dict[str, Any]]:
        """What each decoder layer is called with besides the hidden states: masks and positions, equal for all."""
        calls: list[dict[str, Any]] = [{} for _ in self._layers]

        def keep(index: int, hidden: Tensor, **arguments: Any) -> Tensor:
            calls[index] = arguments
            return hidden

        with self._instead_of_layers(keep):
            self._forward(self._model.base_model, example)
        return calls

    def embed(self, ids: Tensor) -> Tensor:
        """The first layer's hidden states of ids [1, length]: [1, length, hidden_size]."""
        first: list[Tensor] = []

        def keep(index: int, hidden: Tensor, **_: Any) -> Tensor:
            first.append(hidden)
            return hidden

        with self._instead_of_layers(keep):
            self._forward(self._model.base_model, ids)
        return first[0]

    def step(self, layer: int, hidden: Tensor, feed_forward: FeedForward) -> Tensor:
        """Hidden states [1, length, hidden_size] after decoder layer `layer`, with `feed_forward` as its FFN."""
        self._ffn.run = feed_forward
        output = self._layers[layer](hidden, **self._calls[layer])
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """[length, vocabulary] fp32, of the hidden states after the last layer."""
        with self._instead_of_layers(lambda index, _, **arguments: hidden):
            logits: Tensor = self._forward(self._model, ids).logits[0].float()
        return logits

    def weights(self, layer: int) -> LayerWeights:
        """Reads layer `layer` from flash; faster in rising order. Raises DaemonLostError or CorruptionError."""
        module, bundle = self.record.layers[layer].module, self.record.bundle
        *rows, down = read_parts(self._client.source, self.record, layer)
        bias = self._tensors.get(f"{module}.{self._architecture.bias}")
        output_bias = self._tensors.get(f"{module}.{self._architecture.output_bias}")
        if bias is not None:
            placement = self._client.connection.placement(self.record, layer)
            bias = bias.float()[torch.from_numpy(placement.astype(np.int64))]
        assert down.shape[1] == bundle.hidden_size
        parts = [part.float() for part in rows]
        return LayerWeights(
            parts, down.float(), bias, None if output_bias is None else output_bias.float(), self._activation
        )

    def _forward(self, module: Any, ids: Tensor) -> Any:
        return module(input_ids=ids, use_cache=False)

    @contextmanager
    def _instead_of_layers(self, call: Callable[..., Tensor]) -> Iterator[None]:
        """Decoder layers call `call(index, hidden, **arguments)` meanwhile."""
        with ExitStack() as restored:
            for index, layer in enumerate(self._layers):
                layer.forward = partial(call, index)
                restored.callback(delattr, layer, "forward")
            yield


class _PassedFFN(nn.Module):
    """Takes the place of every FFN and runs what it was told to."""

    run: FeedForward

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        return self.run(rows).to(x.dtype).view(x.shape)


def _decoder_layer(model: nn.Module, ffn: str) -> Any:
    """The entry of the model's list of layers that holds the FFN at path `ffn`."""
    path = ffn
    while not isinstance(model.get_submodule(path.rpartition(".")[0]), nn.ModuleList):
        path = path.rpartition(".")[0]
    return model.get_submodule(path)


def read_parts(source: BundleSource, record: weightd_pb2.Model, layer: int) -> list[Tensor]:
    """The matrices of a layer by position: [gate,] up, down, each [neurons, hidden_size] in the stored dtype."""
    bundle, neurons = record.bundle, record.layers[layer].neurons
    rows = np.empty((neurons, bundle.bundle_bytes), np.uint8)

    def copy() -> None:
        for chunk in source.chunks(layer):
            copy_bundles(chunk.addresses, rows[chunk.first : chunk.first + len(chunk.addresses)])

    retry_on_loss(source, copy)
    parts = torch.split(torch.from_numpy(rows), part_bytes(bundle), dim=1)
    return [stored.view(DTYPES[part.encoding.format]) for part, stored in zip(bundle.parts, parts, strict=True)]
