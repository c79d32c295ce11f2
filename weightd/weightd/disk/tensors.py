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
class SourceTensor:
    """A tensor of a checkpoint: contiguous, row-major, `shape` as in transformers' state_dict."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    path: Path
    offset_bytes: int

    @property
    def dtype(self) -> str:
        """The dtype of the elements once they are dequantised: F32 for quantised blocks."""
        return self.encoding.format if is_plain(self.encoding) else "F32"

    @property
    def elements(self) -> int:
        return prod(self.shape)

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
