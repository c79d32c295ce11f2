"""Headers of safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weightd.disk.tensors import SourceTensor, check_extent
from weightd.errors import CheckpointError
from weightd.sizes import format_size
from weightd_proto.encodings import DTYPES, plain

# What the safetensors library accepts; a larger length is not a safetensors file.
HEADER_BYTES_MAX = 100_000_000


def read_safetensors(path: Path) -> dict[str, SourceTensor]:
    """The tensors of the file by name; CheckpointError if it is not whole."""
    file_bytes = path.stat().st_size
    header, data_offset_bytes = read_header(path, file_bytes)
    tensors: dict[str, SourceTensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor = _tensor(path, name, entry, data_offset_bytes)
        check_extent(tensor, file_bytes)
        tensors[name] = tensor
    _check_coverage(path, tensors, data_offset_bytes, file_bytes)
    return tensors


def _check_coverage(path: Path, tensors: dict[str, SourceTensor], data_offset_bytes: int, file_bytes: int) -> None:
    """The tensors must lie end to end from the header to the end of the file, as the safetensors library demands."""
    expected_bytes = data_offset_bytes
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset_bytes, tensor.elements)):
        if tensor.offset_bytes != expected_bytes:
            raise CheckpointError(f"{path} has a bad header: {tensor.name} overlaps another tensor or leaves a gap")
        expected_bytes += tensor.bytes_of(tensor.elements)
    if expected_bytes != file_bytes:
        raise CheckpointError(
            f"{path} has a bad header: {format_size(file_bytes - expected_bytes)} belong to no tensor"
        )


def read_header(path: Path, file_bytes: int) -> tuple[dict[str, Any], int]:
    """The JSON header and the offset of the data."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or header_bytes > HEADER_BYTES_MAX:
            raise CheckpointError(f"{path} is not a safetensors file")
        text = file.read(header_bytes)
    if len(text) < header_bytes:
        raise CheckpointError(
            f"{path} is incomplete: {format_size(file_bytes)} on disk, its header alone takes "
            f"{format_size(header_bytes)}; download it again"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is no JSON object")
    return header, 8 + header_bytes


def _tensor(path: Path, name: str, entry: Any, data_offset_bytes: int) -> SourceTensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        whole = all(type(number) is int for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a bad header entry for {name}") from error
    if not whole:
        raise CheckpointError(f"{path} has a bad header entry for {name}: its sizes are no whole numbers")
    if dtype not in DTYPES:
        raise CheckpointError(f"{path} holds {name} in dtype {dtype}, which is not known here")
    tensor = SourceTensor(name, shape, plain(dtype), path, data_offset_bytes + begin)
    if begin < 0 or min(shape, default=0) < 0 or tensor.bytes_of(tensor.elements) != end - begin:
        raise CheckpointError(f"{path} has a bad header entry for {name}: its shape does not fit its size")
    return tensor
