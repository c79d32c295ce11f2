"""The proof of a recipe: a tiny model is imported by it and streamed, and must compute what transformers computes.

The import is that of weightd in small, in memory: the tiny model's tensors under the names in which transformers saves
it, cut into bundles, in an order of neurons that is not that of the checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from flashclient._native import CellWalk, LentMemory, Workers
from flashclient.errors import AbsentWeightError, ModelError
from flashclient.model.build import build_model
from flashclient.recipes.assembly import assemble
from flashclient.recipes.ffns.site import Site
from flashclient.recipes.ffns.tiny import one_line
from flashclient.recipes.ffns.watching import run
from flashclient.recipes.reference import amend
from flashclient.source.bundle_source import Chunk, Counters
from flashclient.source.memory_cells import MemoryCells, MemoryTable
from flashclient.tensors.names import find_tensors, tied_pairs
from flashclient.tensors.places import Piece, gather
from weightd_proto import weightd_pb2
from weightd_proto.encodings import parts_of, plain
from weightd_proto.tables import ROW, WEIGHT, table_name

TOLERANCE = 1e-3  # of the largest logit, in fp32: limits and gates of small models amplify rounding
ALIGNMENT_BYTES = 64
NAME = "tiny"


def prove(
    tiny: PreTrainedModel,
    outline: PreTrainedModel,
    sites: Sequence[Site],
    embeddings: Sequence[str] = (),
    activation: weightd_pb2.Activation | None = None,
) -> None:
    """Compares `tiny`, imported and streamed by its own recipe, with transformers.

    Args:
        tiny: is changed where `activation` is not what it computes.
        outline: the same model on the meta device.
        embeddings: modules that become tables.

    Raises:
        ModelError: it computes something else, or cannot be imported or built.
    """
    made = _streamed(tiny, outline, sites, embeddings, activation)
    expected, logits = run(tiny).logits, _run_streamed(made)
    difference = float((logits - expected).abs().max())
    if not difference <= TOLERANCE * float(expected.abs().max()):
        raise ModelError(_refusal(tiny, made))


def _streamed(
    tiny: PreTrainedModel,
    outline: PreTrainedModel,
    sites: Sequence[Site],
    embeddings: Sequence[str],
    activation: weightd_pb2.Activation | None,
) -> PreTrainedModel:
    recipe, tensors = _imported(tiny, outline, sites, embeddings)
    if activation is not None:
        amend(tiny, activation)
        recipe.model.activation.CopyFrom(activation)
    source: Any = ArraySource(recipe, tensors)
    with tempfile.TemporaryDirectory() as folder:
        tiny.config.save_pretrained(folder)
        try:
            return build_model(source.record, Path(folder), source, source.placements.__getitem__, Workers(1)).model
        except Exception as error:  # transformers' classes raise anything
            raise _cannot_be_streamed(tiny, error) from error


def _run_streamed(model: PreTrainedModel) -> Tensor:
    try:
        logits: Tensor = run(model).logits
    except Exception as error:  # a class that does something else with its FFNs can fail anywhere
        raise _cannot_be_streamed(model, error) from error
    return logits


def _cannot_be_streamed(model: PreTrainedModel, error: Exception) -> ModelError:
    return ModelError(f"{type(model).__name__} cannot be streamed: {one_line(error)}")


def _imported(
    tiny: PreTrainedModel, outline: PreTrainedModel, sites: Sequence[Site], embeddings: Sequence[str]
) -> tuple[weightd_pb2.Recipe, dict[str, Tensor]]:
    """The recipe of the tiny model, and its tensors as transformers saves them."""
    tied = tied_pairs(tiny)
    state = {name: tensor.detach() for name, tensor in tiny.state_dict().items() if name not in tied}
    tensors: dict[str, Tensor] = revert_weight_conversion(tiny, state)
    places = {name: Piece.whole(name, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return assemble(outline, sites, find_tensors(outline, places), embeddings), tensors


class ArraySource:
    """A BundleSource of a model in this process's memory, in exact mode.

    Attributes:
        record: of the model.
        placements: by layer, the neuron at each position.
    """

    def __init__(self, recipe: weightd_pb2.Recipe, tensors: dict[str, Tensor]) -> None:
        self.errors = nullcontext()
        self.record = weightd_pb2.Model()
        self.record.CopyFrom(recipe.model)
        self.record.name = NAME
        self.record.compute_dtype = "F32"
        layout = self.record.bundle
        names = [part.name for part in layout.parts]
        del layout.parts[:]
        layout.parts.extend(parts_of(names, plain("F32")))
        layout.bundle_bytes = 4 * len(names) * layout.hidden_size
        layout.stride_bytes = -(-layout.bundle_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        layout.bundles_per_cell = 1
        self.placements = [_placement(layer) for layer in self.record.layers]
        self._bundles = [
            _bundles(ffn, tensors, placement, layout.stride_bytes)
            for ffn, placement in zip(recipe.ffns, self.placements, strict=True)
        ]
        self._lent = [LentMemory(bundles) for bundles in self._bundles]
        others = {source.name: gather(source.source, tensors) for source in recipe.resident}
        rows = {module: others.pop(f"{module}.{WEIGHT}") for module in recipe.tables}
        self.tables = [self._add_table(module, weight) for module, weight in rows.items()]
        self.resident = self._place_resident(others)

    def _add_table(self, module: str, weight: Tensor) -> MemoryTable:
        count, width = weight.shape
        layout = weightd_pb2.BundleLayout(hidden_size=width, parts=parts_of((ROW,), plain("F32")))
        layer = weightd_pb2.Layer(module=module, neurons=count, place=weightd_pb2.Layer.TABLE, weights=[WEIGHT])
        self.record.tables.add(name=table_name(NAME, module), bundle=layout, layers=[layer])
        return MemoryTable(np.ascontiguousarray(weight.float().numpy()).view(np.uint8))

    def chunks(self, layer: int) -> Generator[Chunk, None, None]:
        bundles = self._bundles[layer]
        addresses = np.uint64(bundles.ctypes.data) + np.arange(len(bundles), dtype=np.uint64) * np.uint64(
            bundles.shape[1]
        )
        yield Chunk(0, addresses)

    def sweep(self) -> None:
        """None: the chunks are made in Python."""

    def open_walk(self) -> CellWalk:
        stride_bytes = self.record.bundle.stride_bytes
        begins = [int(bundles.ctypes.data) for bundles in self._bundles]
        return CellWalk(MemoryCells(lambda layer, cell: begins[layer] + cell * stride_bytes), 1, stride_bytes)

    def require_open(self) -> None:
        """No-op: there is no session."""

    def counters(self) -> Counters:
        return Counters()

    def idle(self) -> None:
        """No-op: no cells are leased."""

    def _place_resident(self, tensors: dict[str, Tensor]) -> NDArray[np.uint8]:
        data = bytearray()
        for name, tensor in tensors.items():
            values = tensor.float() if tensor.is_floating_point() else tensor
            stored = values.contiguous().view(-1).numpy().tobytes()
            dtype = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}[values.dtype]
            data += b"\0" * (-len(data) % ALIGNMENT_BYTES)
            self.record.resident.add(
                name=name, dtype=dtype, shape=tensor.shape, offset_bytes=len(data), size_bytes=len(stored)
            )
            data += stored
        self.record.resident_file_bytes = len(data)
        return np.frombuffer(data, np.uint8)


def _placement(layer: weightd_pb2.Layer) -> NDArray[np.uint32]:
    """An order of the neurons of each expert that is not theirs."""
    experts = max(1, layer.experts)
    width = layer.neurons // experts
    order = np.random.default_rng(0).permutation(width)
    return np.concatenate([expert * width + order for expert in range(experts)]).astype(np.uint32)


def _bundles(
    ffn: weightd_pb2.FfnSource, tensors: dict[str, Tensor], placement: NDArray[np.uint32], stride_bytes: int
) -> NDArray[np.uint8]:
    width = len(placement) // len(ffn.experts)
    rows = [[_rows(tensors[part.tensor], part, width) for part in expert.parts] for expert in ffn.experts]
    values = torch.cat([torch.cat(parts, dim=1) for parts in rows]).numpy()[placement]
    bundles = np.zeros((len(values), stride_bytes), np.uint8)
    bundles[:, : values.shape[1] * 4] = np.ascontiguousarray(values).view(np.uint8)
    return bundles


def _rows(tensor: Tensor, source: weightd_pb2.MatrixSource, width: int) -> Tensor:
    matrix = tensor[source.matrix] if tensor.dim() == 3 else tensor
    rows = matrix.T if source.columns else matrix
    return rows[source.first :: source.step][:width].float()


def _refusal(tiny: PreTrainedModel, streamed: PreTrainedModel) -> str:
    """Names the first module, in the order of calls, whose output differs."""
    expected, made = _outputs(tiny), _outputs(streamed)
    for name, output in expected.items():
        other = made.get(name)
        if other is None or other.shape != output.shape or output.numel() == 0:
            continue
        scale = float(output.abs().max())
        difference = float((other.float() - output.float()).abs().max())
        if not difference <= TOLERANCE * scale:
            module = type(tiny.get_submodule(name)).__name__
            return (
                f"{name} ({module}) computes something else when it is streamed: values of up to {scale:.3g} differ by "
                f"{difference:.3g}"
            )
    return f"{type(tiny).__name__} computes other logits when it is streamed"


def _outputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """The output of the last call of each module that returns a tensor."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, __: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            outputs.pop(name, None)
            outputs[name] = first.detach().clone()

    hooks = []
    for name, module in model.named_modules():
        with suppress(AbsentWeightError):  # a part of a streamed FFN
            hooks.append(module.register_forward_hook(partial(keep, name)))
    run(model, hooks)
    return outputs
