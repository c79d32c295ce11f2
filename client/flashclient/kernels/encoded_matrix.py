"""Weights whose rows are stored in blocks (weightd_proto.encodings.BLOCK_FORMATS), as kernels take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashclient._native import EncodedMatrix, decode_rows
from flashclient.kernels.arrays import array_of
from weightd_proto.encodings import in_blocks

DECODED_ELEMENTS = 1 << 20  # at a time: what is not in fp32 needs a copy in fp32 before


class BlockRows:
    """The rows of a matrix in blocks, in memory that is not copied.

    Args:
        stored: [rows, bytes], uint8.
        format: one of BLOCK_FORMATS.
        columns: of the matrix.
        dtype: of the values that are asked for.

    Raises:
        ValueError: the rows are not so many whole blocks.
    """

    def __init__(self, stored: Tensor, format: str, columns: int, dtype: torch.dtype) -> None:
        self.format = format
        self.matrix = EncodedMatrix(in_blocks(format), array_of(stored), columns)
        self.shape = (len(stored), columns)
        self._stored = stored
        self._dtype = dtype

    def part(self, rows: slice) -> BlockRows:
        """Some of the rows, in the same memory."""
        return BlockRows(self._stored[rows], self.format, self.shape[1], self._dtype)

    def read(self, ids: Tensor) -> Tensor:
        """The values of the rows `ids`: [ids, columns]. IndexError, that of torch, for a row that is not there."""
        return self._decoded(self._stored.index_select(0, ids.reshape(-1)))

    def values(self) -> Tensor:
        """All values, decoded anew."""
        rows, columns = self.shape
        values = torch.empty(rows, columns, dtype=self._dtype, device="cpu")
        together = max(1, DECODED_ELEMENTS // columns)
        for first in range(0, rows, together):
            values[first : first + together] = self._decoded(self._stored[first : first + together])
        return values

    def _decoded(self, rows: Tensor) -> Tensor:
        values = torch.empty(len(rows), self.shape[1], dtype=torch.float32, device="cpu")
        decode_rows(in_blocks(self.format), array_of(rows), array_of(values))
        return values.to(self._dtype)


class WeightInBlocks(nn.Parameter):
    """A parameter that holds no elements, but `rows`."""

    rows: BlockRows


def matrix_of(weight: Tensor, rows: slice = slice(None)) -> Any:
    """A weight, or some rows of it, as kernels of linear layers take it: its array, or its rows in blocks."""
    if not isinstance(weight, WeightInBlocks):
        return array_of(weight[rows])
    return weight.rows.matrix if rows == slice(None) else weight.rows.part(rows).matrix
