"""Reads files that have one checksum for all of their bytes: those under hf/, and those of a calibration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from weightd import _native
from weightd.disk.uncached_file import UncachedReader, aligned_buffer
from weightd.errors import CorruptionError
from weightd.store.store import FILES_FOLDER, Store
from weightd_proto import weightd_pb2

PIECE_BYTES = 1 << 20


def check_files(store: Store, model: weightd_pb2.Model) -> None:
    """Reads every file under hf/. CorruptionError names the model and the file that differs from its checksum."""
    for file in model.files:
        for _ in model_file(store, model, file):
            pass


def model_file(
    store: Store, model: weightd_pb2.Model, file: weightd_pb2.File, piece_bytes: int = PIECE_BYTES
) -> Iterator[memoryview]:
    """The bytes of a file under hf/, as pieces() yields them."""
    path = store.files_path(model.name) / file.name
    return pieces(path, file, f"model {model.name}, file {FILES_FOLDER}/{file.name}", "import it again", piece_bytes)


def pieces(
    path: Path, file: weightd_pb2.File, what: str, advice: str, piece_bytes: int = PIECE_BYTES
) -> Iterator[memoryview]:
    """Yields the file's bytes, read past the page cache. A piece is valid until the next one is taken.

    The checksum covers the whole file, so CorruptionError for a wrong checksum comes after the last piece. If the file
    is missing, has another size or cannot be read, CorruptionError comes before. `what` begins the error's text.
    """
    checksum = _native.Checksum()
    try:
        with UncachedReader(path) as reader:
            if reader.size_bytes != file.size_bytes:
                raise CorruptionError(f"{what}: it has {reader.size_bytes} bytes, not {file.size_bytes}; {advice}")
            buffer = aligned_buffer(reader.buffer_bytes(min(piece_bytes, file.size_bytes)))
            for first in range(0, file.size_bytes, piece_bytes):
                data = reader.read(first, min(piece_bytes, file.size_bytes - first), buffer)
                checksum.update(np.frombuffer(data, np.uint8))
                yield data
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise CorruptionError(f"{what}: it cannot be read: {reason}; check the device, or {advice}") from error
    if checksum.value != file.checksum:
        raise CorruptionError(f"{what}: it differs from its checksum; {advice}")
