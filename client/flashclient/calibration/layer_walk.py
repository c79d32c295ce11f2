"""Runs a model one decoder layer at a time over any number of sequences, so that each layer is read from flash once.

A walk holds one layer's FFN in fp32. The caller holds the sequences' hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flashclient._native import copy_bundles, decode_rows
from flashclient.errors import CalibrationError
from flashclient.kernels.dtypes import DTYPES
from flashclient.model.activations import activation_of, neurons_of
from flashclient.model.build import resident_tensors
from flashclient.model.install import biases_of, streamed_ffns
from flashclient.model.loaded import LoadedModel
from flashclient.source.bundle_source import retry_on_loss
from weightd_proto import weightd_pb2
from weightd_proto.encodings import bundle_neurons, bundles_in, encodings_of, is_plain, part_bytes

FeedForward = Callable[[Tensor], Tensor]  # [tokens, hidden_size] fp32 -> the same


@contextmanager
def layer_walk(loaded: LoadedModel, example: Tensor) -> Iterator[LayerWalk]:
    """A walk through `loaded`, in its caller's turn. Afterwards the model is as it was.

    Args:
        loaded: a model in exact mode.
        example: [1, length] ids; every sequence of the walk has this length.
    """
    ffns = streamed_ffns(loaded.model)
    with loaded.taken():
        walk = LayerWalk(loaded)
        with _forwards(ffns, [walk.run_ffn] * len(ffns)):
            walk.record_calls(example)
            yield walk


@dataclass(frozen=True)
class LayerWeights:
    """One layer's FFN in fp32, rows by position. Its results are the reference for the kernels.

    Attributes:
        rows: [gate,] up, each [neurons, hidden_size].
        down: [neurons, hidden_size].
        biases: by part but down, each [neurons], or None; output_bias: [hidden_size] or None.
    """

    rows: list[Tensor]
    down: Tensor
    biases: Tensor | None
    output_bias: Tensor | None
    activation: weightd_pb2.Activation

    def neurons(self, x: Tensor) -> Tensor:
        """The neurons' outputs [tokens, neurons] for x [tokens, hidden_size]. A neuron fires where that is not 0."""
        products = [x @ rows.T for rows in self.rows]
        if self.biases is not None:
            products = [part + bias for part, bias in zip(products, self.biases, strict=True)]
        return neurons_of(self.activation, *products)

    def sum(self, fired: Tensor) -> Tensor:
        """The FFN's output for the neurons' outputs `fired`: [tokens, hidden_size]."""
        total = fired @ self.down
        return total if self.output_bias is None else total + self.output_bias


class LayerWalk:
    """Runs the decoder layers of a loaded model one by one, with FFNs that the caller gives. See layer_walk()."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._model: Any = loaded.model
        self._loaded = loaded
        self._tensors = resident_tensors(loaded.record, loaded.source.resident, DTYPES[loaded.record.compute_dtype])
        self._layers = [_decoder_layer(self._model, layer.module) for layer in loaded.record.layers]
        self._calls: list[dict[str, Any]] = [{} for _ in self._layers]
        self._feed_forward: FeedForward = torch.zeros_like

    def run_ffn(self, x: Tensor) -> Tensor:
        """What the model's FFNs compute during the walk."""
        rows = x.reshape(-1, x.shape[-1]).float()
        return self._feed_forward(rows).to(x.dtype).view(x.shape)

    def record_calls(self, example: Tensor) -> None:
        """Keeps the decoder layers' other arguments (masks, position ids), which are the same for all layers."""

        def keep(index: int, hidden: Tensor, **arguments: Any) -> Tensor:
            self._calls[index] = arguments
            return hidden

        with self._layers_call(keep):
            self._forward(self._model.base_model, example)

    def embed(self, ids: Tensor) -> Tensor:
        """The first layer's hidden states of ids [1, length]: [1, length, hidden_size]."""
        first: list[Tensor] = []

        def keep(index: int, hidden: Tensor, **_: Any) -> Tensor:
            first.append(hidden)
            return hidden

        with self._layers_call(keep):
            self._forward(self._model.base_model, ids)
        return first[0]

    def step(self, layer: int, hidden: Tensor, feed_forward: FeedForward) -> Tensor:
        """Hidden states [1, length, hidden_size] after decoder layer `layer`, with `feed_forward` as its FFN."""
        self._feed_forward = feed_forward
        output = self._layers[layer](hidden, **self._calls[layer])
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """[length, vocabulary] fp32, of the hidden states after the last layer."""
        with self._layers_call(lambda index, _, **arguments: hidden):
            logits: Tensor = self._forward(self._model, ids).logits[0].float()
        return logits

    def weights(self, layer: int) -> LayerWeights:
        """Reads layer `layer` from flash; ascending order is faster. Raises DaemonLostError or CorruptionError."""
        record = self._loaded.record
        described = record.layers[layer]
        *rows, down = (part.float() for part in read_parts(self._loaded, layer))
        biases = biases_of(record, described, self._tensors, lambda: self._loaded.placement(layer))
        output_bias = self._tensors[described.output_bias].float() if described.output_bias else None
        by_part = None if biases is None else torch.from_numpy(biases)
        return LayerWeights(rows, down, by_part, output_bias, activation_of(record, described))

    def _forward(self, module: Any, ids: Tensor) -> Any:
        return module(input_ids=ids, use_cache=False)

    def _layers_call(self, call: Callable[..., Tensor]) -> AbstractContextManager[None]:
        """Inside the `with` statement decoder layers run `call(index, hidden, **arguments)` instead of computing."""
        return _forwards(self._layers, [partial(call, index) for index in range(len(self._layers))])


@contextmanager
def _forwards(modules: Sequence[nn.Module], functions: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
    """Inside the `with` statement each of `modules` runs one of `functions` instead of its forward()."""
    before = [vars(module).get("forward") for module in modules]
    for module, function in zip(modules, functions, strict=True):
        module.forward = function
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _decoder_layer(model: nn.Module, ffn: str) -> Any:
    """The entry of the model's list of layers that holds the FFN at path `ffn`."""
    path = ffn
    while not isinstance(model.get_submodule(path.rpartition(".")[0]), nn.ModuleList):
        path = path.rpartition(".")[0]
    return model.get_submodule(path)


def check_by_neuron(record: weightd_pb2.Model) -> None:
    """Raises CalibrationError for a model in slabs, whose neurons are not read one by one."""
    if bundle_neurons(record.bundle) > 1:
        raise CalibrationError(
            f"model '{record.name}' runs in mode 'exact' only: its FFNs are stored as published, in slabs of "
            f"{record.bundle.slab_neurons} neurons; import it with --dtype bf16, int8 or int4 for another mode"
        )


def read_parts(loaded: LoadedModel, layer: int) -> list[Tensor]:
    """The matrices of a layer by position: [gate,] up, down, each [neurons, hidden_size] in the stored dtype; in fp32
    where they are quantised."""
    bundle, of_layer = loaded.record.bundle, loaded.record.layers[layer]
    rows = np.empty((bundles_in(bundle, of_layer), bundle.bundle_bytes), np.uint8)

    def copy() -> None:
        for chunk in loaded.source.chunks(layer):
            copy_bundles(chunk.addresses, rows[chunk.first : chunk.first + len(chunk.addresses)])

    retry_on_loss(loaded.source, copy)
    sizes = part_bytes(bundle, of_layer)
    parts = torch.split(torch.from_numpy(rows[:, : sum(sizes)]), sizes, dim=1)
    encodings, neurons = encodings_of(bundle, of_layer), bundle_neurons(bundle)
    if neurons == 1:
        return [values_of(encoding, stored) for encoding, stored in zip(encodings, parts, strict=True)]
    *firsts, down = (part.contiguous() for part in parts)
    rows_of = [part.view(of_layer.neurons, -1) for part in firsts]
    matrices = [values_of(encoding, stored) for encoding, stored in zip(encodings[:-1], rows_of, strict=True)]
    of_outputs = values_of(encodings[-1], down.view(len(down) * bundle.hidden_size, -1))
    by_slab = of_outputs.view(len(down), bundle.hidden_size, neurons)
    return [*matrices, by_slab.transpose(1, 2).reshape(of_layer.neurons, bundle.hidden_size)]


def values_of(encoding: weightd_pb2.Encoding, stored: Tensor) -> Tensor:
    """The numbers of rows that are stored as bytes [rows, bytes]."""
    if is_plain(encoding):
        return stored.view(DTYPES[encoding.format])
    values = stored.shape[1] // encoding.block_bytes * encoding.block_values
    decoded = torch.empty(len(stored), values, dtype=torch.float32, device="cpu")
    decode_rows(encoding, stored.contiguous().numpy(), decoded.numpy())
    return decoded
