"""Rows of a table, read from a weightd."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flashclient._native import copy_rows
from flashclient.errors import ModelError
from flashclient.kernels.dtypes import DTYPES
from flashclient.kernels.encoded_matrix import BlockRows
from flashclient.source.bundle_source import CellsSource, retry_on_loss
from weightd_proto import weightd_pb2
from weightd_proto.encodings import BLOCK_FORMATS, stored_bytes


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
        self._format = part.encoding.format
        if self._format not in DTYPES and self._format not in BLOCK_FORMATS:
            raise ModelError(f"table {table.name} has unknown format {self._format}; upgrade flashclient")
        self.shape = (layer.neurons, table.bundle.hidden_size)
        self._dtype = DTYPES[table.compute_dtype if self._format in BLOCK_FORMATS else self._format]
        self._row_bytes = stored_bytes(part.encoding, table.bundle.hidden_size)
        self._source = source
        self._walk = source.open_walk()

    def read(self, ids: Tensor) -> Tensor:
        """The rows of `ids`: [ids, width] in the stored dtype; of blocks, the values. Each distinct row is read once.

        Raises:
            IndexError: there is no such row; that of torch.
            CorruptionError, DaemonLostError.
        """
        rows, width = self.shape
        numbers = ids.reshape(-1).to(torch.int64)
        if len(numbers) and (int(numbers.min()) < 0 or int(numbers.max()) >= rows):
            raise IndexError("index out of range in self")
        stored = torch.empty(len(numbers), self._row_bytes, dtype=torch.uint8, device="cpu")
        retry_on_loss(self._source, partial(self._copy, numbers, stored))
        if self._format in BLOCK_FORMATS:
            return BlockRows(stored, self._format, width, self._dtype).values()
        return stored.view(self._dtype)

    def _copy(self, numbers: Tensor, stored: Tensor) -> None:
        with self._source.errors:
            copy_rows(self._walk, numbers.numpy(), stored.numpy())
