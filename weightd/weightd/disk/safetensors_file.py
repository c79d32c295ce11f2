"""Reads which tensors a safetensors file holds, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weightd.disk.lfs_pointer import check_no_pointer
from weightd.disk.tensors import SourceTensor, check_extent, check_name
from weightd.errors import CheckpointError
from weightd.sizes import format_size
from weightd_proto.encodings import DTYPES, plain
from weightd_proto.safetensors_header import LENGTH_BYTES, METADATA, HeaderError, parse, text_bytes

SIZE_MAX = (1 << 31) - 1  # of a dimension: beyond any model, and beside a dimension of 0 no file could hold it


def read_safetensors(path: Path) -> dict[str, SourceTensor]:
    """The tensors of the file by name. CheckpointError if the file is not whole."""
    file_bytes = path.stat().st_size
    check_no_pointer(path)
    header, data_offset_bytes = _read_header(path, file_bytes)
    tensors: dict[str, SourceTensor] = {}
    for name, entry in header.items():
        if name == METADATA:
            continue
        tensor = _tensor(path, name, entry, data_offset_bytes)
        check_extent(tensor, file_bytes)
        tensors[name] = tensor
    _check_coverage(path, tensors, data_offset_bytes, file_bytes)
    return tensors


def _check_coverage(path: Path, tensors: dict[str, SourceTensor], data_offset_bytes: int, file_bytes: int) -> None:
    """CheckpointError unless the tensors lie back to back from the header to the end of the file.

    The safetensors library has the same rule.
    """
    expected_bytes = data_offset_bytes
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset_bytes, tensor.elements)):
        if tensor.offset_bytes != expected_bytes:
            raise CheckpointError(f"{path} has a bad header: {tensor.name} overlaps another tensor or leaves a gap")
        expected_bytes += tensor.bytes_of(tensor.elements)
    if expected_bytes != file_bytes:
        raise CheckpointError(
            f"{path} has a bad header: {format_size(file_bytes - expected_bytes)} belong to no tensor"
        )


def _read_header(path: Path, file_bytes: int) -> tuple[dict[str, Any], int]:
    """The entries of the header, and the offset of the data."""
    try:
        with path.open("rb") as file:
            header_bytes = text_bytes(file.read(LENGTH_BYTES))
            text = file.read(header_bytes)
        if len(text) < header_bytes:
            raise CheckpointError(
                f"{path} is incomplete: {format_size(file_bytes)} on disk, its header alone takes "
                f"{format_size(header_bytes)}; download it again"
            )
        return parse(text), LENGTH_BYTES + header_bytes
    except HeaderError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def _tensor(path: Path, name: str, entry: Any, data_offset_bytes: int) -> SourceTensor:
    check_name(path, name)
    try:
        dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        whole = all(type(number) is int for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a bad header entry for {name}") from error
    if not whole:
        raise CheckpointError(f"{path} has a bad header entry for {name}: its sizes are not whole numbers")
    if dtype not in DTYPES:
        raise CheckpointError(f"{path} holds {name} in dtype {dtype}, which weightd does not know")
    tensor = SourceTensor(name, shape, plain(dtype), path, data_offset_bytes + begin)
    fits = max(shape, default=0) <= SIZE_MAX and tensor.bytes_of(tensor.elements) == end - begin
    if begin < 0 or min(shape, default=0) < 0 or not fits:
        raise CheckpointError(f"{path} has a bad header entry for {name}: its shape does not fit its size")
    return tensor
