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
class SourceTensor:
    """A tensor of a checkpoint: contiguous, row-major. `name` is the file's, `shape` as transformers publishes it."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    path: Path
    offset_bytes: int
    undo: Undo | None = None

    @property
    def dtype(self) -> str:
        """The dtype of the elements once they are dequantised: F32 for quantised blocks."""
        return self.encoding.format if is_plain(self.encoding) else "F32"

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
