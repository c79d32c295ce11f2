"""Whether the checkpoint of a model has changed since it was imported.

The record of an import has name, size and a checksum of each file of the checkpoint. The checksum is the XXH3-64 of the
time of the last change and of samples of the bytes. So a check costs a few reads of 4 KiB per file, whatever its size,
and notices a file that was rewritten with the same size and an old time. A file that was only touched counts as
changed: one import too many does no harm, but serving old weights would.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from weightd import _native
from weightd.disk.gguf_names import parts_of
from weightd_proto import weightd_pb2

WEIGHTS = {".safetensors", ".bin", ".gguf"}
# The kinds of files that an import may read. An edited README does not change the checkpoint.
SUFFIXES = WEIGHTS | {".json", ".model", ".txt", ".tiktoken", ".jinja"}
FOLDERS = ("chat_templates", "additional_chat_templates")
SAMPLES = 32
SAMPLE_BYTES = 4096


def origin_of(path: Path, dtype: str, activation: str = "") -> weightd_pb2.Origin:
    """The origin of the checkpoint at `path` (a folder or a file), imported with these flags. OSError."""
    files = [_file(name, file) for name, file in sorted(_files(path).items())]
    resolved = path.resolve()
    commit = resolved.name if hub_name_of(resolved) else ""
    return weightd_pb2.Origin(dtype=dtype, files=files, commit=commit, activation=activation)


def changed_weights(path: Path, origin: weightd_pb2.Origin) -> list[str]:
    """The names of the files that may hold weights and are no longer as `origin` says. Raises OSError."""
    whole = path.is_file()
    files = [_file(name, file) for name, file in _files(path).items() if whole or file.suffix in WEIGHTS]
    now = {file.name: file for file in files}
    weights = [file for file in origin.files if whole or Path(file.name).suffix in WEIGHTS]
    return [file.name for file in weights if now.get(file.name) != file]


def source_text(path: Path) -> str:
    """What was imported, as the catalog stores it: `path` without symbolic links, UTF-8 with escapes for other bytes.

    A snapshot in the hub's cache, or a file of it, is named as on the hub: its path differs with every revision.
    """
    resolved = path.resolve()
    if (name := hub_name_of(resolved)) is not None:
        return name
    if (name := hub_name_of(path.absolute().parent)) is not None:  # a file there is a link to a blob
        return f"{name}/{path.name}"
    return os.fsencode(resolved).decode(errors="backslashreplace")


def hub_name_of(path: Path) -> str | None:
    """ORGANISATION/NAME if `path` is a snapshot in the hub's cache: models--ORGANISATION--NAME/snapshots/COMMIT."""
    found = re.fullmatch(r".*/models--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]+", str(path))
    return None if found is None else f"{found[1]}/{found[2]}"


def _files(path: Path) -> dict[str, Path]:
    """The files of the checkpoint by their name in the record."""
    if path.is_file():
        parts = {name: path.parent / name for name in parts_of(path.name)}
        return {path.name: path} | {name: part for name, part in parts.items() if part.is_file()}
    folders = [path, *(path / name for name in FOLDERS)]
    files = [file for folder in folders if folder.is_dir() for file in folder.iterdir()]
    return {str(file.relative_to(path)): file for file in files if file.suffix in SUFFIXES and file.is_file()}


def _file(name: str, path: Path) -> weightd_pb2.File:
    checksum = _native.Checksum()
    with path.open("rb", buffering=0) as file:
        facts = os.fstat(file.fileno())
        checksum.update(np.array([facts.st_mtime_ns], np.int64).view(np.uint8))
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead: only the samples are read
        last = max(0, facts.st_size - SAMPLE_BYTES)
        for offset_bytes in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}):
            checksum.update(np.frombuffer(os.pread(file.fileno(), SAMPLE_BYTES, offset_bytes), np.uint8))
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    readable = os.fsencode(name).decode(errors="backslashreplace")
    return weightd_pb2.File(name=readable, size_bytes=facts.st_size, checksum=checksum.value)
