"""Reads the header of GGUF files: metadata, and the extents and encodings of tensors.
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)

The reader of the gguf package maps the whole file and makes a numpy object per metadata element, which takes half a
gigabyte for a vocabulary of 262144. So this module reads the header; it uses the package for the quantised types.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from weightd.checkpoint.model_folder import ModelFolder
from weightd.disk.gguf_names import part_names
from weightd.disk.lfs_pointer import check_no_pointer
from weightd.disk.tensors import SourceTensor, check_extent
from weightd.errors import CheckpointError
from weightd.sizes import round_up
from weightd_proto.encodings import plain
from weightd_proto.weightd_pb2 import Encoding

Item = TypeVar("Item")
MAGIC = b"GGUF"
VERSIONS = (2, 3)
SWAPPED_VERSIONS = tuple(version << 24 for version in VERSIONS)  # in big endian
PART, PARTS = "split.no", "split.count"
ALIGNMENT_BYTES_DEFAULT = 32
STRING_TYPE, ARRAY_TYPE = 8, 9
DIMENSIONS_MAX = 4  # GGML_MAX_DIMS
SCALAR_DTYPES = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
PLAIN_TYPES = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}


@dataclass(frozen=True)
class Value:
    """A metadata value with its type: a scalar, a str, a list of str or a numpy array."""

    kind: int
    item_kind: int  # of an array
    content: Any


@dataclass(frozen=True)
class GgufFile:
    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, SourceTensor]

    @property
    def architecture(self) -> str:
        value = self.metadata.get("general.architecture")
        if value is None or value.kind != STRING_TYPE:
            raise CheckpointError(f"{self.path} does not say its architecture")
        return str(value.content)


def read_gguf(path: Path, folder: ModelFolder | None = None) -> GgufFile:
    """Reads the header, and those of the other parts if the file is the first part of a split one.

    `folder`: has the parts; None: the user has named the file, and they may lie where it does.

    CheckpointError if a file is incomplete, is not GGUF, or is not the part that its name says.
    """
    first = read_header(path)
    parts = _whole_number(path, first.metadata, PARTS, 1)
    if parts <= 1:
        return first
    names = part_names(path.name, parts)
    if not names:
        raise CheckpointError(
            f"{path} is one of {parts} parts, whose names end in -00001-of-{parts:05d}.gguf and so on: rename them, or "
            "join them with llama-gguf-split --merge"
        )
    if path.name != names[0]:
        raise CheckpointError(f"{path} is one of {parts} parts: give the first, {names[0]}")
    _check_part(first, 0, parts)
    folder, tensors = folder or ModelFolder(path.parent, named=path), dict(first.tensors)
    missing = [name for name in names if not folder.has(name)]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the {parts} parts of {path} are missing, first {missing[0]}: download them, too"
        )
    for index, name in enumerate(names[1:], 1):
        part = read_header(folder.file(name))
        _check_part(part, index, parts)
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise CheckpointError(f"{part.path} has {min(twice)}, as a part before it has: download the parts again")
        tensors |= part.tensors
    return replace(first, tensors=tensors)


def _check_part(file: GgufFile, index: int, parts: int) -> None:
    """CheckpointError if the file does not say that it is this part."""
    found = [_whole_number(file.path, file.metadata, name, default) for name, default in ((PART, 0), (PARTS, 1))]
    if found != [index, parts]:
        raise CheckpointError(
            f"{file.path} says that it is part {found[0] + 1} of {found[1]}, and its name that it is {index + 1} of "
            f"{parts}: download it again"
        )


def read_header(path: Path) -> GgufFile:
    """Reads the header of one file, which may be a part. CheckpointError if it is incomplete, or is not GGUF."""
    file_bytes = path.stat().st_size
    check_no_pointer(path)
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: give a Hugging Face folder or a .gguf file")
        try:
            parsed = _Header(path, file, file_bytes).parse()
        except (EOFError, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise CheckpointError(f"{path} is incomplete: its header ends early; download it again") from error
    for tensor in parsed.tensors.values():
        check_extent(tensor, file_bytes)
    _check_apart(parsed)
    return parsed


def _check_apart(file: GgufFile) -> None:
    """CheckpointError if tensors overlap, so that at least one of them holds numbers of another."""
    end_bytes, before = 0, ""
    for tensor in sorted(file.tensors.values(), key=lambda tensor: (tensor.offset_bytes, tensor.elements)):
        if tensor.offset_bytes < end_bytes:
            raise CheckpointError(f"{file.path} is damaged: {tensor.name} overlaps {before}; download it again")
        end_bytes, before = tensor.offset_bytes + tensor.bytes_of(tensor.elements), tensor.name


def _whole_number(path: Path, metadata: Mapping[str, Value], name: str, default: int) -> int:
    value = metadata.get(name)
    if value is None:
        return default
    if not isinstance(value.content, int) or value.content < 0:
        raise CheckpointError(f"{path} has {name} {value.content!r}, which is not a count")
    return value.content


class _Header:
    """Reads a header from an open file."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self._path = path
        self._file = file
        self._file_bytes = file_bytes

    def parse(self) -> GgufFile:
        version = self._number("<I")
        if version in SWAPPED_VERSIONS:
            raise CheckpointError(
                f"{self._path} is big-endian: convert a copy of it with gguf-convert-endian FILE little"
            )
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self._path} has GGUF version {version}, known are 2 and 3: download a newer file, or import the "
                "Hugging Face folder"
            )
        tensor_count, metadata_count = self._number("<Q"), self._number("<Q")
        metadata = self._unique(self._entry() for _ in range(metadata_count))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        self._unique((name, None) for name, *_ in infos)
        alignment_bytes = _whole_number(self._path, metadata, "general.alignment", ALIGNMENT_BYTES_DEFAULT)
        if alignment_bytes == 0:
            raise CheckpointError(f"{self._path} has general.alignment 0")
        data_offset_bytes = round_up(self._file.tell(), alignment_bytes)
        tensors = {
            name: SourceTensor(name, shape, encoding, self._path, data_offset_bytes + offset_bytes)
            for name, shape, encoding, offset_bytes in infos
        }
        return GgufFile(self._path, metadata, tensors)

    def _unique(self, entries: Iterable[tuple[str, Item]]) -> dict[str, Item]:
        """Entries by their names. A name that occurs twice is refused: readers differ in which of the two counts."""
        found: dict[str, Item] = {}
        for name, entry in entries:
            if name in found:
                raise CheckpointError(f"{self._path} has {name} twice")
            found[name] = entry
        return found

    def _bytes(self, count: int) -> bytes:
        if count > self._file_bytes - self._file.tell():  # checked before memory is allocated
            raise EOFError
        return self._file.read(count)

    def _number(self, form: str) -> int:
        (value,) = struct.unpack(form, self._bytes(struct.calcsize(form)))
        return int(value)

    def _string(self) -> str:
        return self._bytes(self._number("<Q")).decode()

    def _entry(self) -> tuple[str, Value]:
        name = self._string()
        kind = self._number("<I")
        if kind != ARRAY_TYPE:
            return name, Value(kind, kind, self._value(kind))
        item_kind, count = self._number("<I"), self._number("<Q")
        if item_kind == STRING_TYPE:
            return name, Value(kind, item_kind, [self._string() for _ in range(count)])
        dtype = self._scalar_dtype(item_kind)
        return name, Value(kind, item_kind, np.frombuffer(self._bytes(count * dtype.itemsize), dtype))

    def _value(self, kind: int) -> Any:
        if kind == STRING_TYPE:
            return self._string()
        dtype = self._scalar_dtype(kind)
        return np.frombuffer(self._bytes(dtype.itemsize), dtype)[0].item()

    def _scalar_dtype(self, kind: int) -> np.dtype[Any]:
        if kind not in SCALAR_DTYPES:
            raise CheckpointError(f"{self._path} has metadata of type {kind}, which weightd does not know")
        return np.dtype(SCALAR_DTYPES[kind])

    def _tensor_info(self) -> tuple[str, tuple[int, ...], Encoding, int]:
        name = self._string()
        rank = self._number("<I")
        if rank > DIMENSIONS_MAX:
            raise CheckpointError(f"{self._path} holds {name} in {rank} dimensions, GGML knows {DIMENSIONS_MAX}")
        dimensions = [self._number("<Q") for _ in range(rank)]
        encoding = self._encoding(name, self._number("<I"))
        shape = tuple(reversed(dimensions))  # GGUF begins with the innermost dimension
        row_elements = shape[-1] if shape else 1
        if row_elements % encoding.block_values:
            raise CheckpointError(f"{self._path} holds {name} in rows of {row_elements}, not in whole quantised blocks")
        return name, shape, encoding, self._number("<Q")

    def _encoding(self, name: str, kind: int) -> Encoding:
        if kind in PLAIN_TYPES:
            return plain(PLAIN_TYPES[kind])
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            quantisation = GGMLQuantizationType(kind)
            block_values, block_bytes = GGML_QUANT_SIZES[quantisation]
            dequantize(np.zeros((1, block_bytes), np.uint8), quantisation)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise CheckpointError(f"{self._path} holds {name} in GGML type {kind}, which gguf cannot decode") from error
        return Encoding(
            format=quantisation.name, block_values=block_values, block_bytes=block_bytes, scales=Encoding.IN_BLOCK
        )
