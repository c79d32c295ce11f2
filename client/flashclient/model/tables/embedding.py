"""Embeddings that look up the rows of a table.

A module stays what it is, and so do scales, padding and the like of its class. Only its weight is replaced: torch's
embedding() of it reads the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from flashclient.errors import ModelError
from flashclient.model.absent_weights import AbsentWeight, HoldsAbsentWeights, make_absent
from flashclient.model.tables.rows import TableRows
from flashclient.source.bundle_source import CellsSource
from weightd_proto import weightd_pb2
from weightd_proto.tables import WEIGHT

# What would be so if the weight were here. transformers takes a model's device from its first weight.
_PLACE: dict[Any, Any] = {
    Tensor.device.__get__: torch.device("cpu"),
    Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
}


class LookedUpRows(Protocol):
    """Rows of a matrix, by their numbers."""

    def read(self, ids: Tensor) -> Tensor: ...


class AbsentTable(AbsentWeight):
    """The weight of an embedding. Rows can be looked up; what needs all of it raises AbsentWeightError."""

    rows: LookedUpRows

    @classmethod
    def of_rows(cls, rows: LookedUpRows, path: str, unmade: Tensor) -> AbsentTable:
        weight = cls.of(path, unmade)
        assert isinstance(weight, cls)
        weight.rows = rows
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PLACE:
            return _PLACE[func]
        if func is functional.embedding and len(args) > 1 and isinstance(args[1], cls):
            return cls._look_up(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @staticmethod
    def _look_up(
        ids: Tensor,
        weight: AbsentTable,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *rest: Any,
        **more: Any,
    ) -> Tensor:
        """torch's embedding(). Padding concerns gradients only, and so do the arguments after norm_type."""
        read = weight.rows.read(ids)
        if max_norm is not None:  # torch limits the rows of the weight first
            every = torch.arange(len(read), device="cpu")
            read = functional.embedding(every, read, None, max_norm, *rest, **more)
        return read.view(*ids.shape, read.shape[1])


def install_tables(model: PreTrainedModel, record: weightd_pb2.Model, sources: Sequence[CellsSource]) -> None:
    """Replaces the weights of the embeddings that are tables.

    Raises:
        ModelError: the model has no such embedding, or one of another shape.
    """
    for table, source in zip(record.tables, sources, strict=True):
        (layer,) = table.layers
        rows = TableRows(table, source)
        try:
            module = model.get_submodule(layer.module)
            found = tuple(module.get_parameter(WEIGHT).shape)
        except AttributeError:
            found = ()
        if found != rows.shape:
            is_there = f"has shape {found}" if found else "is missing"
            raise ModelError(
                f"model '{record.name}' does not fit {type(model).__name__}: {layer.module}.{WEIGHT} {is_there}, the "
                f"store has a table of shape {rows.shape}; import it again"
            )
        make_absent(module, layer.module, [WEIGHT], HoldsAbsentWeights, partial(AbsentTable.of_rows, rows))
