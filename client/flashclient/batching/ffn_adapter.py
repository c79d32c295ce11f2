"""LoRA adapters of FFNs: PEFT reads them into modules that stand in, and streamed FFNs get what it has read.

What an adapter adds to the products with gate rows and up rows enters the activation, row by row. What it adds to the
output is computed from the neurons' own outputs. So all neurons are computed: exact mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flashclient.errors import OptionError
from flashclient.model.absent_weights import HoldsAbsentWeights, Unchangeable
from flashclient.model.parts import FUSED_FORMS
from weightd_proto import weightd_pb2

Placement = Callable[[int], NDArray[np.uint32]]  # layer -> the neuron at each position


@dataclass(frozen=True)
class AdapterProduct:
    """A product of two matrices, in fp32, and a factor."""

    first: nn.Module
    last: nn.Module
    factor: float

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x))
        return y * self.factor


@dataclass(frozen=True)
class FfnAdapter:
    """What is added within the FFN of one layer, whose neurons are in the order of their positions.

    Attributes:
        inputs: for each part of a bundle but down, of x.
        output: of the neurons' outputs.
    """

    inputs: Sequence[AdapterProduct | None]
    output: AdapterProduct | None
    neurons: int

    def row_biases(self, x: Tensor) -> NDArray[np.float32] | None:
        """[parts but down, tokens, neurons], added to the products of x [tokens, hidden_size] before the activation."""
        if not any(self.inputs):
            return None
        added = torch.zeros(len(self.inputs), len(x), self.neurons, dtype=torch.float32, device="cpu")
        for of_part, low_rank in zip(added, self.inputs, strict=True):
            if low_rank is not None:
                of_part.copy_(low_rank(x))
        return added.numpy()

    def room_for_h(self, rows: int) -> NDArray[np.float32] | None:
        """Where output_of() wants what the neurons give, [tokens, neurons]."""
        return None if self.output is None else np.empty((rows, self.neurons), np.float32)

    def output_of(self, h: NDArray[np.float32]) -> Tensor:
        """What is added to the FFN's output: [tokens, hidden_size]."""
        assert self.output is not None
        return self.output(torch.from_numpy(h))


@dataclass
class _StandIn:
    """A projection that PEFT may wrap.

    Attributes:
        parts: those whose rows the projection holds.
        plain: what stands in.
    """

    layer: int
    parts: tuple[str, ...]
    path: str
    parent: Any
    name: str
    projection: Any
    plain: nn.Module

    @property
    def now(self) -> Any:
        return self.parent._modules[self.name]


@contextmanager
def standing_in(model: nn.Module, record: weightd_pb2.Model) -> Iterator[list[_StandIn]]:
    """Puts modules without memory in the place of the FFNs' projections, for as long as PEFT looks for places."""
    places = [place for index, layer in enumerate(record.layers) for place in _places(model, record, index, layer)]
    fixed = {place.parent: place.parent.__dict__.get("fixed_parts") for place in places}
    try:
        for parent in fixed:
            parent.__dict__["fixed_parts"] = frozenset()
        for place in places:
            place.parent._modules[place.name] = place.plain
        yield places
    finally:
        for place in places:
            place.parent._modules[place.name] = place.projection
        for parent, names in fixed.items():
            parent.__dict__["fixed_parts"] = names


def _places(model: nn.Module, record: weightd_pb2.Model, index: int, layer: weightd_pb2.Layer) -> Iterator[_StandIn]:
    if layer.place == weightd_pb2.Layer.EXPERTS:
        return
    held: dict[str, list[str]] = {}
    for name, part in zip(layer.weights, record.bundle.parts, strict=True):
        held.setdefault(name.rpartition(".")[0], []).append(part.name)
    for owner, parts in held.items():
        path = f"{layer.module}.{owner}"
        above, _, name = path.rpartition(".")
        parent = model.get_submodule(above)
        projection: Any = parent._modules[name]
        yield _StandIn(index, tuple(parts), path, parent, name, projection, _plain(projection))


def _plain(projection: nn.Module) -> nn.Module:
    """A module of the projection's own class, whose weights are one number that is repeated."""
    kinds = type(projection).__mro__
    kind: Any = next(
        one for one in kinds if not issubclass(one, HoldsAbsentWeights | Unchangeable) and issubclass(one, nn.Module)
    )
    made = copy.copy(projection)
    made.__class__ = kind
    made._modules, made._parameters = {}, {}
    for name, weight in projection._parameters.items():
        one = None if weight is None else torch.zeros(1, dtype=weight.dtype, device="cpu").expand(weight.shape)
        made.register_parameter(name, None if one is None else nn.Parameter(one, requires_grad=False))
    return made


def taken_out(
    places: list[_StandIn], record: weightd_pb2.Model, name: str, adapter: str, placement: Placement
) -> dict[int, FfnAdapter]:
    """What PEFT has read for the FFNs, by layer.

    Args:
        name: of the adapter, for users.
        adapter: PEFT's name of it.

    Raises:
        OptionError: it is of a kind that a streamed FFN cannot compute.
    """
    rows = [part.name for part in record.bundle.parts[:-1]]
    found: dict[int, dict[str, AdapterProduct]] = {}
    for place in places:
        wrapped = place.now
        if adapter not in getattr(wrapped, "lora_A", {}):
            if wrapped is not place.plain:
                raise OptionError(f"adapter '{name}' changes {place.path} otherwise than by LoRA, which FFNs cannot")
            continue
        if adapter in wrapped.lora_variant:
            kind = type(wrapped.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
            raise OptionError(
                f"adapter '{name}' is of the kind {kind} at {place.path}, and FFNs take plain LoRA: train it so, or "
                "merge it into the checkpoint and import that"
            )
        of_layer = found.setdefault(place.layer, {})
        first, last, factor = wrapped.lora_A[adapter], wrapped.lora_B[adapter], float(wrapped.scaling[adapter])
        order = torch.from_numpy(placement(place.layer).astype(np.int64))
        if place.parts == (record.bundle.parts[-1].name,):
            of_layer[place.parts[0]] = AdapterProduct(_kept(first, columns=order), _kept(last), factor)
            continue
        for part, taken in _rows_of(place, name, order).items():
            of_layer[part] = AdapterProduct(_kept(first), _kept(last, rows=taken), factor)
    return {
        layer: FfnAdapter(
            [parts.get(part) for part in rows],
            parts.get(record.bundle.parts[-1].name),
            record.layers[layer].neurons,
        )
        for layer, parts in found.items()
    }


def _rows_of(place: _StandIn, name: str, order: Tensor) -> dict[str, Tensor]:
    """By part, the rows of its matrix in the order of the neurons' positions."""
    if len(place.parts) == 1:
        return {place.parts[0]: order}
    form = getattr(place.parent, "fused_form", None)
    if form is None:
        raise OptionError(
            f"adapter '{name}' adapts {place.path}, of which it is not known which rows are the gate's: merge it into "
            "the checkpoint and import that"
        )
    return {part: FUSED_FORMS[form](part == "up", len(order), order) for part in place.parts}


def _kept(linear: Any, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Module:
    """A copy in fp32 with these rows or columns, in this order."""
    made = copy.copy(linear)
    made._parameters = {}
    made.out_features = linear.out_features if rows is None else len(rows)  # of a fused matrix, a half
    for name, values in linear._parameters.items():
        if values is None:
            made.register_parameter(name, None)
            continue
        taken = values.detach().float()
        taken = taken[rows] if rows is not None else taken
        taken = taken[:, columns] if columns is not None and taken.dim() > 1 else taken
        made.register_parameter(name, nn.Parameter(taken.contiguous(), requires_grad=False))
    return made.eval()  # type: ignore[no-any-return]
