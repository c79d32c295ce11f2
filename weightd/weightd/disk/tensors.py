"""Where tensors lie in files, and how their elements are stored."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from weightd.errors import CheckpointError
from weightd.sizes import format_size
from weightd_proto.encodings import is_plain, stored_bytes
from weightd_proto.weightd_pb2 import Encoding


@dataclass(frozen=True)
class Undo:
    """A change that a converter made to a tensor's values, and that the reader undoes.

    With `heads`, the rows of each head were interleaved (rotary halves side by side). With `heads` = 0, one was added
    to each value.
    """

    heads: int = 0


@dataclass(frozen=True)
class BlockScales:
    """The factors of a tensor's values, which lie in a tensor of their own: one for each block of rows x columns.

    Factors of U8 and F8_E8M0 are exponents.

    Attributes:
        tensor: [..., rows of blocks, columns of blocks].
        matrix_rows: of the tensor's last two dimensions. Blocks do not reach from one matrix into the next.
        dtype: that of the values once they are dequantised, by the checkpoint's publisher.
    """

    tensor: SourceTensor
    rows: int
    columns: int
    matrix_rows: int
    dtype: str

    def row_of(self, row: int) -> int:
        """The row of `tensor` that has the factors of a row of values."""
        matrix, within = divmod(row, self.matrix_rows)
        return matrix * self.tensor.shape[-2] + within // self.rows


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a checkpoint: contiguous, row-major. `name` is the file's, `shape` as transformers publishes it."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    path: Path
    offset_bytes: int
    undo: Undo | None = None
    scales: BlockScales | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the stored numbers are the elements, one by one."""
        return self.scales is None and is_plain(self.encoding)

    @property
    def dtype(self) -> str:
        """The dtype of the elements once they are dequantised: F32 for blocks with their own scales."""
        if self.scales is not None:
            return self.scales.dtype
        return self.encoding.format if self.is_plain else "F32"

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def rows(self) -> int:
        """Rows of the tensor, of shape[-1] elements each.

        A vector is one row, unless its elements must be permuted back: then each is a row.
        """
        if len(self.shape) == 1 and not (self.undo and self.undo.heads):
            return 1
        return prod(self.shape[:-1]) if len(self.shape) > 1 else self.elements

    @property
    def row_elements(self) -> int:
        return self.elements // max(1, self.rows)

    @property
    def rows_together(self) -> int:
        """How many rows must be read together: those of a head if they are permuted, otherwise 1."""
        return self.rows // self.undo.heads if self.undo and self.undo.heads else 1

    def bytes_of(self, elements: int) -> int:
        """The stored size of so many elements, which must be whole blocks."""
        return stored_bytes(self.encoding, elements)


def check_extent(tensor: SourceTensor, file_bytes: int) -> None:
    """CheckpointError if the tensor reaches beyond its file."""
    end_bytes = tensor.offset_bytes + tensor.bytes_of(tensor.elements)
    if end_bytes > file_bytes:
        raise CheckpointError(
            f"{tensor.path} is incomplete: {format_size(file_bytes)} on disk, but {tensor.name} ends at "
            f"{format_size(end_bytes)}; download it again"
        )
