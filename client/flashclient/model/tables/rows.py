"""Rows of a table, read from a weightd."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flashclient._native import copy_rows
from flashclient.errors import ModelError
from flashclient.kernels.dtypes import DTYPES
from flashclient.source.bundle_source import CellsSource, retry_on_loss
from weightd_proto import weightd_pb2


class TableRows:
    """The rows of one table.

    Args:
        table: its record.
        source: of its cells.

    Raises:
        ModelError: its dtype is unknown.
    """

    def __init__(self, table: weightd_pb2.Model, source: CellsSource) -> None:
        (layer,), (part,) = table.layers, table.bundle.parts
        if part.encoding.format not in DTYPES:
            raise ModelError(f"table {table.name} has unknown dtype {part.encoding.format}; upgrade flashclient")
        self.shape = (layer.neurons, table.bundle.hidden_size)
        self._dtype = DTYPES[part.encoding.format]
        self._source = source
        self._walk = source.open_walk()

    def read(self, ids: Tensor) -> Tensor:
        """The rows of `ids`: [ids, width] in the stored dtype. Each distinct row is read once.

        Raises:
            IndexError: there is no such row; that of torch.
            CorruptionError, DaemonLostError.
        """
        rows, width = self.shape
        numbers = ids.reshape(-1).to(torch.int64)
        if len(numbers) and (int(numbers.min()) < 0 or int(numbers.max()) >= rows):
            raise IndexError("index out of range in self")
        read = torch.empty(len(numbers), width, dtype=self._dtype, device="cpu")
        retry_on_loss(self._source, partial(self._copy, numbers, read))
        return read

    def _copy(self, numbers: Tensor, read: Tensor) -> None:
        with self._source.errors:
            copy_rows(self._walk, numbers.numpy(), read.view(torch.uint8).numpy())
