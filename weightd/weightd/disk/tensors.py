"""Where tensors lie in files, and how their elements are stored."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from weightd.errors import CheckpointError
from weightd.sizes import format_size

FLOAT_DTYPES = ("F32", "BF16", "F16")
ELEMENT_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Encoding:
    """How the elements of a tensor are stored: `block_bytes` for every `block_elements` of a row."""

    dtype: str  # of the elements when decoded: as safetensors spells it; F32 for what is quantised
    block_elements: int
    block_bytes: int
    ggml_type: int | None = None  # of quantised blocks


def plain(dtype: str) -> Encoding:
    """The encoding of elements stored as they are."""
    return Encoding(dtype, 1, ELEMENT_BYTES[dtype])


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a checkpoint: contiguous, row-major, `shape` as in transformers' state_dict."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    path: Path
    offset_bytes: int

    @property
    def dtype(self) -> str:
        return self.encoding.dtype

    @property
    def elements(self) -> int:
        return prod(self.shape)

    def bytes_of(self, elements: int) -> int:
        """Stored bytes of that many elements, which must be whole blocks."""
        assert elements % self.encoding.block_elements == 0
        return elements // self.encoding.block_elements * self.encoding.block_bytes


def check_extent(tensor: SourceTensor, file_bytes: int) -> None:
    """CheckpointError if the tensor reaches beyond its file."""
    end_bytes = tensor.offset_bytes + tensor.bytes_of(tensor.elements)
    if end_bytes > file_bytes:
        raise CheckpointError(
            f"{tensor.path} is incomplete: {format_size(file_bytes)} on disk, but {tensor.name} ends at "
            f"{format_size(end_bytes)}; download it again"
        )
