"""Calibrations: what `flashclient calibrate` measured on a model, kept in the model's folder.

    STORE/<model>/calibration/<version>/{predictors.safetensors, statistics.safetensors, report.json}

- Clients write and read the files (client/flashclient/model/predictor_file.py specifies their format). For the daemon
  a file is a sequence of bytes with an XXH3-64. All files together may be as large as the model.
- Versions count from 1. The catalog names the newest, and only that is read: a session that attached with an older one
  has it in memory, and a Fetch that is under way has its file open. So older folders are deleted.
- Publishing: the files are staged like an import (store.py), synced, and renamed to their version. Then the catalog
  gets the record in one transaction. A folder that the catalog does not name is deleted by the next publishing or
  start of the daemon.

Refused: missing, additional or empty files; more bytes than the model has; a calibration of another import of the
model; bytes that differ from their checksums; a device without enough room.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np

from weightd import _native
from weightd.errors import CorruptionError, RequestError, SpaceError, StoreError
from weightd.sizes import format_size
from weightd.store.staged_folder import StagedFolder, delete, set_aside, space_errors, sync
from weightd.store.store import Store
from weightd_proto import weightd_pb2
from weightd_proto.files import CALIBRATION_FILES, PREDICTORS_FILE

CALIBRATION_FOLDER = "calibration"
MODES = ("exact", "predict")
LOSSY_MODES = ("", "predict", "threshold")  # "": predict, of clients that do not say it
# The paper's predictors take less than 5 % of a model, and a calibration as large as its model would be of no use. The
# constant part is for toy models, whose files consist mostly of headers.
MODEL_SHARE_MAX = 1
HEADERS_BYTES_MAX = 1 << 20


def calibration_path(store: Store, model: str, version: int) -> Path:
    return store.path / model / CALIBRATION_FOLDER / str(version)


def predictors_of(calibration: weightd_pb2.Calibration) -> weightd_pb2.File | None:
    """The record of predictors.safetensors; None when the model was never calibrated."""
    return next((file for file in calibration.files if file.name == PREDICTORS_FILE), None)


def check_calibration(model: weightd_pb2.Model, offered: weightd_pb2.Calibration) -> None:
    """RequestError or StoreError, with the wrong value, if `offered` cannot become the calibration of `model`."""
    _require_same_import(model, offered)
    if offered.mode not in MODES:
        raise RequestError(f"mode {offered.mode!r} of a calibration: want {' or '.join(MODES)}")
    if offered.lossy_mode not in LOSSY_MODES or (offered.lossy_mode == "threshold" and offered.mode != "exact"):
        raise RequestError(
            f"a calibration for mode {offered.lossy_mode!r} with mode {offered.mode!r} as the default: want predict, "
            "or threshold with exact as the default"
        )
    names = [file.name for file in offered.files]
    if sorted(names) != sorted(CALIBRATION_FILES):
        raise RequestError(f"a calibration of the files {names}: want {', '.join(CALIBRATION_FILES)}")
    for file in offered.files:
        if file.size_bytes == 0:
            raise RequestError(f"the file {file.name} of a calibration is empty")
    size_bytes = sum(file.size_bytes for file in offered.files)
    most_bytes = MODEL_SHARE_MAX * (model.bundles_file_bytes + model.resident_file_bytes) + HEADERS_BYTES_MAX
    if size_bytes > most_bytes:
        raise RequestError(
            f"a calibration of {format_size(size_bytes)}: {model.name!r} may have one of {format_size(most_bytes)}"
        )


def _require_same_import(model: weightd_pb2.Model, offered: weightd_pb2.Calibration) -> None:
    if offered.import_id != model.import_id:
        raise StoreError(
            f"a calibration of another import of {model.name!r}: import {offered.import_id.hex() or 'none'}, where the "
            f"store has {model.import_id.hex()}; calibrate the model that is there now"
        )


class CalibrationStaging(StagedFolder):
    """A calibration that is being published: `write` its bytes, then `publish`. Without `publish` nothing stays."""

    def __init__(self, store: Store, model: weightd_pb2.Model, offered: weightd_pb2.Calibration) -> None:
        """Raises the errors of check_calibration, and SpaceError if the device lacks the room."""
        check_calibration(model, offered)
        size_bytes = sum(file.size_bytes for file in offered.files)
        free_bytes = shutil.disk_usage(store.path).free
        if size_bytes > free_bytes:
            raise SpaceError(
                f"a calibration of {format_size(size_bytes)} does not fit into {store.path}, where "
                f"{format_size(free_bytes)} are free: make room"
            )
        with store.locked():
            super().__init__(store.path)
        self.store = store
        self._model = model.name
        self._offered = offered
        self._missing = list(offered.files)  # the first one is being written
        self._file: BinaryIO | None = None
        self._written_bytes = 0
        self._checksum = _native.Checksum()

    def write(self, data: bytes) -> None:
        """Writes the next bytes of the files, which come back to back in the header's order.

        RequestError for too many bytes, CorruptionError if a file differs from its checksum, SpaceError.
        """
        rest = memoryview(data)
        while rest:
            if not self._missing:
                raise RequestError(f"{len(rest)} bytes beyond the files of the calibration")
            part = rest[: self._missing[0].size_bytes - self._written_bytes]
            self._write_part(part)
            rest = rest[len(part) :]

    def _write_part(self, part: memoryview) -> None:
        wanted = self._missing[0]
        with space_errors(self.store.path):
            if self._file is None:
                self._file = (self.folder / wanted.name).open("wb")
            self._file.write(part)
            self._checksum.update(np.frombuffer(part, np.uint8))
            self._written_bytes += len(part)
            if self._written_bytes == wanted.size_bytes:
                self._finish_file(self._file, wanted)

    def _finish_file(self, file: BinaryIO, wanted: weightd_pb2.File) -> None:
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.close()
        if self._checksum.value != wanted.checksum:
            raise CorruptionError(f"the file {wanted.name} of a calibration of {self._model!r} came with other bytes")
        self._missing.pop(0)
        self._file, self._written_bytes, self._checksum = None, 0, _native.Checksum()

    def publish(self) -> weightd_pb2.Calibration:
        """Makes this the model's newest calibration.

        RequestError if bytes are missing, StoreError if the model was removed or imported again meanwhile.
        """
        if self._missing:
            raise RequestError(f"the calibration ended early, in {self._missing[0].name}: send it again")
        published = weightd_pb2.Calibration()
        published.CopyFrom(self._offered)
        published.published_unix_s = int(time.time())
        with self.store.locked(), space_errors(self.store.path):
            model = self.store.model(self._model)
            _require_same_import(model, published)
            published.version = model.calibration.version + 1
            target = calibration_path(self.store, self._model, published.version)
            target.parent.mkdir(exist_ok=True)
            sync(target.parent.parent)
            if target.exists():  # left by a publishing that was killed before its transaction
                delete(set_aside(self.store.path, target))
            self.move(target)
            self.store.catalog.set_calibration(self._model, published)
            self.finish()
        return published

    def close(self) -> None:
        """Deletes the files unless they were published."""
        if self._file is not None:
            self._file.close()
        super().close()


def remove_old(store: Store, model: weightd_pb2.Model) -> None:
    """Deletes all calibrations of the model except the one in its record."""
    folder = store.path / model.name / CALIBRATION_FOLDER
    old = [path for path in folder.iterdir() if path.name != str(model.calibration.version)] if folder.is_dir() else []
    for path in old:
        delete(set_aside(store.path, path))
