"""Where tensors lie in files, and how their elements are stored."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from weightd.errors import CheckpointError
from weightd.sizes import format_size
from weightd_proto.encodings import BLOCK_FORMATS, in_blocks, is_plain, plain, stored_bytes
from weightd_proto.weightd_pb2 import Encoding

NAME_CHARACTERS_MAX = 1000  # of a tensor: far above any model's, and an error that names it stays a line
WIDE = plain("F64")  # rounded to F32 when it is read, as transformers does
KEPT_VALUES = 32  # of a block in which published integers are kept (importing/quantised/kept_blocks.py)


@dataclass(frozen=True)
class Undo:
    """A change that a converter made to a tensor's values, and that the reader undoes.

    With `heads`, the rows of each head were interleaved (rotary halves side by side). With `heads` = 0, one was added
    to each value.
    """

    heads: int = 0


@dataclass(frozen=True)
class Packing:
    """How integers of a few bits lie in words of 32 bits, one word after the other.

    Attributes:
        bits: of an integer.
        across: a word holds numbers of one column, in consecutive rows; otherwise those of one row.
        order: which of its numbers a word holds in its lowest bits, in the next, and so on.
    """

    bits: int
    across: bool
    order: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """Of a word."""
        return 32 // self.bits


@dataclass(frozen=True)
class NestedScales:
    """Factors that are quantised themselves: numbers[code] * factors[block of codes] + offset.

    Attributes:
        numbers, factors: F32. Of each code, and of each `size` codes in row-major order.
    """

    numbers: bytes
    factors: bytes
    size: int
    offset: float


@dataclass(frozen=True)
class BlockScales:
    """The factors of a tensor's values, which lie in a tensor of their own: one for each block of rows x columns.

    value = (number - zero) * factor. Factors of U8 and F8_E8M0 are exponents.

    Attributes:
        tensor: [..., rows of blocks, columns of blocks].
        matrix_rows: of the tensor's last two dimensions. Blocks do not reach from one matrix into the next.
        dtype: that of the values once they are dequantised, by the checkpoint's publisher.
        zero: of all blocks, if they have no `zeros`.
        zeros: shaped as `tensor`. `zero` is added to each, and of a packed one the result is taken modulo 2 ** bits.
        groups: int32 for each row, or each column if blocks are of one row: its block, where they are not in order.
        divisor: of all factors.
        multiplier: of all factors.
        transposed: rows are inputs, so that a block of 32 inputs of one output lies in 32 rows.
        nested: what the codes in `tensor` stand for, if it does not hold the factors themselves.
        kept: the format of blocks in which the import keeps the numbers; empty: it dequantises them.
    """

    tensor: SourceTensor
    rows: int
    columns: int
    matrix_rows: int
    dtype: str
    zero: int = 0
    zeros: SourceTensor | None = None
    groups: bytes = b""
    divisor: float = 1.0
    multiplier: float = 1.0
    transposed: bool = False
    nested: NestedScales | None = None
    kept: str = ""

    def rows_of(self, first: int, end: int) -> tuple[int, int]:
        """The rows of `tensor` that have the factors of some rows of values: from one to another."""
        if self.groups and self.transposed:
            return 0, self.tensor.rows
        return self._row_of(first), self._row_of(end - 1) + 1

    def _row_of(self, row: int) -> int:
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
    packing: Packing | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the stored numbers are the elements, one by one."""
        return self.scales is None and is_plain(self.encoding) and self.encoding != WIDE

    @property
    def dtype(self) -> str:
        """The dtype of the elements once they are dequantised: F32 for blocks with their own scales, and for F64."""
        if self.scales is not None:
            return self.scales.dtype
        return self.encoding.format if self.is_plain else "F32"

    @property
    def kept_format(self) -> str:
        """The format of blocks in which the import can keep the numbers; empty: it must dequantise them."""
        if self.scales is not None:
            return self.scales.kept
        format = self.encoding.format
        return format if format in BLOCK_FORMATS and self.encoding == in_blocks(format) else ""

    @property
    def in_columns(self) -> bool:
        """Whether a block holds numbers of consecutive rows, in one column."""
        return self.scales is not None and self.scales.transposed

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
        """How many rows must be read together: those of a head if they are permuted, those whose numbers share a word
        or a block, otherwise 1."""
        if self.scales is not None and self.scales.transposed and self.rows % KEPT_VALUES == 0:
            return KEPT_VALUES
        if self.packing is not None and self.packing.across:
            return self.packing.numbers
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


def check_name(path: Path, name: object) -> None:
    """CheckpointError if a tensor of the file has no name: pickles allow any object, JSON half of a surrogate pair."""
    known = isinstance(name, str) and len(name) <= NAME_CHARACTERS_MAX
    if not known or str(name).encode(errors="ignore").decode() != name:
        raise CheckpointError(f"{path} holds a tensor under {ascii(name)[:100]}, which is no name of a tensor")
