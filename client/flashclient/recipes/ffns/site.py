"""An FFN of a model, or the experts of one mixture: where its weights are, and what it computes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from weightd_proto import weightd_pb2

Layer = weightd_pb2.Layer
NO_SIZE = re.compile("limit|alpha|clamp|^max$")  # of numbers that are no sizes, though they may be integers


@dataclass(frozen=True)
class Rows:
    """The rows of a part in a parameter: rows `block` of `blocks` equal ones, or every `blocks`-th row if interleaved.

    Attributes:
        parameter: its name below the site's module.
        columns: the neurons' rows are columns of the parameter.
        experts: 0, or the number of matrices in the parameter, one for each expert.
    """

    parameter: str
    columns: bool = False
    block: int = 0
    blocks: int = 1
    interleaved: bool = False
    experts: int = 0

    def first_and_step(self, neurons: int) -> tuple[int, int]:
        """Neuron j has row first + step * j."""
        return (self.block, self.blocks) if self.interleaved else (self.block * neurons, 1)

    def of(self, parameter: Tensor) -> Tensor:
        """The rows: [..., neurons, hidden size] of a matrix, [..., neurons] of a bias."""
        if parameter.dim() < (2 if not self.experts else 3):
            return self._block(parameter.unsqueeze(-1)).squeeze(-1)
        return self._block(parameter.transpose(-1, -2) if self.columns else parameter)

    def _block(self, rows: Tensor) -> Tensor:
        if self.interleaved:
            return rows[..., self.block :: self.blocks, :]
        return rows.chunk(self.blocks, dim=-2)[self.block]


@dataclass(frozen=True)
class Part:
    """A part of the bundles: gate, up or down. `bias`: added before the activation; of down, to the output."""

    name: str
    rows: Rows
    bias: Rows | None = None


@dataclass(frozen=True)
class Site:
    """See Layer in weightd.proto.

    Attributes:
        parts: [gate,] up, down.
        neurons: of one expert.
        experts: 0 for an FFN.
    """

    module: str
    place: Layer.Place
    activation: weightd_pb2.Activation
    parts: tuple[Part, ...]
    neurons: int
    hidden_size: int
    experts: int = 0

    def path(self, parameter: str) -> str:
        """The name in the model of a parameter below the site's module."""
        return f"{self.module}.{parameter}" if self.module else parameter

    def names(self) -> list[str]:
        """The parts' names."""
        return [part.name for part in self.parts]


def scalars_of(module: nn.Module) -> set[float]:
    """Numbers that a module, its parts and its config hold, and that can be parameters or limits of a formula."""
    found: set[float] = set()
    for part in module.modules():
        found |= set(_numbers(vars(part)))
        config = vars(part).get("config")
        if config is not None:
            found |= set(_numbers({name: value for name, value in vars(config).items() if NO_SIZE.search(name)}))
    return found


def _numbers(values: dict[str, Any]) -> Iterator[float]:
    for name, value in values.items():
        if isinstance(value, float) or (type(value) is int and NO_SIZE.search(name)):
            yield float(value)
