"""The catalog of a store: an LMDB environment in one file. The docstring of store.py lists its keys.

LMDB refuses to open an environment twice in one process, and an environment must not be used after a fork. Operations
on a catalog are rare and short, so each one opens the environment and closes it, and threads of a process take turns.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from weightd import _native
from weightd.errors import CorruptionError, SpaceError, StoreError
from weightd.store.catalog_pages import check_pages
from weightd_proto import encodings, weightd_pb2
from weightd_proto.tables import with_tables

MAGIC = "weightd-store"
FORMAT_VERSION = 4
CHECKSUMS_SINCE = 2  # in a store of an older format, values have no checksums
CHECKSUM_BYTES = 8
NEURONS_MAX = (1 << 32) - 1  # of a model: 32 bits number them
FILE_BYTES_MAX = 1 << 60  # of any file: sums of sizes fit 64 bits
META_KEY = b"meta"
DEVICE_PROFILE_KEY = b"device_profile"
MODEL_PREFIX = b"model/"
# Address space, not memory or disk: the file grows as it is filled. A neuron takes 12 bytes (checksum, placement), so a
# 70B model (80 layers of 28672) takes 27 MB, and this is room for more than two thousand such models.
MAP_BYTES = 64 << 30

Arrays = Mapping[str, list[npt.NDArray[np.generic]]]  # by kind, one for each layer

_turn = threading.Lock()


def calibration_key(model: str) -> bytes:
    return f"calibration/{model}".encode()


def hotness_key(model: str) -> bytes:
    return f"hotness/{model}".encode()


def array_key(kind: str, model: str, layer: int) -> bytes:
    return f"{kind}/{model}/{layer:05d}".encode()


class Records:
    """The records of one transaction. Each value is followed by the XXH3-64 of key and value."""

    def __init__(self, transaction: lmdb.Transaction, path: Path) -> None:
        self._transaction = transaction
        self._path = path
        meta = self.meta()
        self._version = FORMAT_VERSION if meta is None else meta.get("format_version", 0)

    def meta(self) -> dict[str, Any] | None:
        """The record that says the format. It has no checksum."""
        record = self._transaction.get(META_KEY)
        if record is None:
            return None
        try:
            meta = json.loads(bytes(record))
        except ValueError as error:
            raise CorruptionError(f"the catalog {self._path} is damaged: its record `meta` is not JSON") from error
        return meta if isinstance(meta, dict) else {}

    def set_meta(self, meta: Mapping[str, object]) -> None:
        self._transaction.put(META_KEY, json.dumps(meta).encode())

    def get(self, key: bytes) -> bytes | None:
        """The value, or None. CorruptionError if it differs from its checksum."""
        record = self._transaction.get(key)
        return None if record is None else self._read(key, bytes(record))

    def starting_with(self, prefix: bytes) -> Iterable[bytes]:
        """The values whose keys begin with `prefix`, in the order of the keys."""
        cursor = self._transaction.cursor()
        found = cursor.set_range(prefix)
        while found and bytes(cursor.key()).startswith(prefix):
            yield self._read(bytes(cursor.key()), bytes(cursor.value()))
            found = cursor.next()

    def put(self, key: bytes, record: bytes) -> None:
        self._transaction.put(key, record + (_checksum(key, record) if self._checked else b""))

    def upgrade(self) -> None:
        """Makes a store of an older format one of format 4: models get encodings, and values get checksums.

        A damaged record stays as it is, and is refused when it is read.
        """
        if self._version == FORMAT_VERSION:
            return
        keys = [bytes(key) for key in self._transaction.cursor().iternext(values=False)]
        for key in keys:
            with suppress(CorruptionError):
                if key.startswith(MODEL_PREFIX):
                    self._put_checked(key, _parsed(self.get(key) or b"").SerializeToString())
                elif key != META_KEY and not self._checked:
                    self._put_checked(key, self.get(key) or b"")
        self._version = FORMAT_VERSION
        self.set_meta({"magic": MAGIC, "format_version": FORMAT_VERSION})

    def _put_checked(self, key: bytes, record: bytes) -> None:
        self._transaction.put(key, record + _checksum(key, record))

    @property
    def _checked(self) -> bool:
        return self._version >= CHECKSUMS_SINCE

    def delete(self, key: bytes) -> None:
        self._transaction.delete(key)

    def _read(self, key: bytes, stored: bytes) -> bytes:
        if not self._checked:
            return stored
        record, checksum = stored[:-CHECKSUM_BYTES], stored[-CHECKSUM_BYTES:]
        if checksum != _checksum(key, record):
            raise CorruptionError(
                f"the catalog {self._path} is damaged: its record {key.decode(errors='replace')} differs from its "
                "checksum; restore a copy of it, or import into a new store"
            )
        return record


def _checksum(key: bytes, record: bytes) -> bytes:
    checksum = int(_native.checksum(np.frombuffer(key + record, np.uint8)))
    return checksum.to_bytes(CHECKSUM_BYTES, "little")


class Catalog:
    """Reads and writes the catalog at `path`. Every method is one transaction."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        """Writes the record `meta` if it is missing, also after a creation that was killed.

        The caller holds the store's lock.
        """
        if self.path.exists() and self.path.stat().st_size > 0:
            check_pages(self.path)
        with self._transaction(write=True, create=True) as records:
            if records.meta() is None:
                records.set_meta({"magic": MAGIC, "format_version": FORMAT_VERSION})

    def check(self) -> None:
        """StoreError unless this is a whole catalog of a known format version."""
        if self.path.stat().st_size == 0:  # LMDB calls it a bad file descriptor
            raise CorruptionError(f"the catalog {self.path} is damaged: it is empty; restore a copy, or import anew")
        with self._begun() as transaction:
            check_pages(self.path)  # inside a transaction, so that no page of this snapshot is overwritten meanwhile
            meta = Records(transaction, self.path).meta() or {}
        version = meta.get("format_version")
        if meta.get("magic") != MAGIC or not isinstance(version, int) or version < 1:
            raise StoreError(f"not a weightd store: {self.path} lacks the store's record")
        if version > FORMAT_VERSION:
            raise StoreError(
                f"store of format {version}, this weightd knows up to {FORMAT_VERSION}: "
                f"upgrade weightd to use {self.path.parent}"
            )

    def models(self) -> list[weightd_pb2.Model]:
        """All models in order of their names, each with its newest calibration."""
        with self._transaction() as records:
            return [_model(records, record) for record in records.starting_with(MODEL_PREFIX)]

    def model(self, name: str) -> weightd_pb2.Model | None:
        with self._transaction() as records:
            record = records.get(MODEL_PREFIX + name.encode())
            return None if record is None else _model(records, record)

    def set_calibration(self, model: str, calibration: weightd_pb2.Calibration) -> None:
        """Replaces the model's calibration."""
        with self._transaction(write=True) as records:
            records.put(calibration_key(model), calibration.SerializeToString())

    def hotness(self, model: str) -> bytes | None:
        with self._transaction() as records:
            return records.get(hotness_key(model))

    def set_hotness(self, model: str, hotness: bytes) -> None:
        """Replaces the model's hotness."""
        with self._transaction(write=True) as records:
            records.put(hotness_key(model), hotness)

    def array(self, kind: str, model: str, layer: int) -> bytes | None:
        with self._transaction() as records:
            return records.get(array_key(kind, model, layer))

    def add(self, model: weightd_pb2.Model, arrays: Mapping[str, Arrays]) -> None:
        """Adds the model. An older store becomes one of format 4.

        `arrays`: those of the model and of each table, by its name.
        """
        with self._transaction(write=True) as records:
            records.upgrade()
            for name, kinds in arrays.items():
                for kind, layers in kinds.items():
                    for index, values in enumerate(layers):
                        records.put(array_key(kind, name, index), values.tobytes())
            records.put(MODEL_PREFIX + model.name.encode(), model.SerializeToString())

    def remove(self, name: str, kinds: tuple[str, ...]) -> None:
        with self._transaction(write=True) as records:
            record = records.get(MODEL_PREFIX + name.encode())
            assert record is not None, "looked up under the store's lock"
            records.delete(MODEL_PREFIX + name.encode())
            records.delete(calibration_key(name))
            for stored in with_tables(_parsed(record)):
                records.delete(hotness_key(stored.name))
                for kind in kinds:
                    for index in range(len(stored.layers)):
                        records.delete(array_key(kind, stored.name, index))

    def device_profile(self) -> str | None:
        """The device profile as JSON, or None if nothing was measured."""
        with self._transaction() as records:
            record = records.get(DEVICE_PROFILE_KEY)
        return None if record is None else record.decode()

    def set_device_profile(self, profile: str) -> None:
        with self._transaction(write=True) as records:
            records.put(DEVICE_PROFILE_KEY, profile.encode())

    @contextmanager
    def _transaction(self, write: bool = False, create: bool = False) -> Iterator[Records]:
        with self._begun(write, create) as transaction:
            yield Records(transaction, self.path)

    @contextmanager
    def _begun(self, write: bool = False, create: bool = False) -> Iterator[lmdb.Transaction]:
        with _turn, _translated(self.path), _open(self.path, write, create) as environment:
            if write:
                environment.reader_check()  # frees the reader slots of processes that were killed
            with environment.begin(write=write) as transaction:
                yield transaction


def _model(records: Records, record: bytes) -> weightd_pb2.Model:
    model = _parsed(record)
    calibration = records.get(calibration_key(model.name))
    if calibration is not None:
        _read(model.calibration, calibration)
        _check_sizes(model)
    return model


def _parsed(record: bytes) -> weightd_pb2.Model:
    model = weightd_pb2.Model()
    _read(model, record)
    _check_sizes(model)
    try:
        encodings.upgrade(model)
        encodings.check(model)
    except ValueError as error:
        raise CorruptionError(f"the catalog is damaged: {model.name!r}: {error}; import it again") from error
    return model


def _read(message: weightd_pb2.Model | weightd_pb2.Calibration, record: bytes) -> None:
    """Merges the record into `message`. CorruptionError if it is not one: records of format 1 have no checksums."""
    try:
        message.MergeFromString(record)
    except DecodeError as error:
        raise CorruptionError(f"the catalog is damaged: {error} as the record of a model; import it again") from error


def _check_sizes(model: weightd_pb2.Model) -> None:
    """CorruptionError for sizes that no model has."""
    for table in model.tables:
        _check_sizes(table)
    neurons, cells = sum(layer.neurons for layer in model.layers), sum(layer.cells for layer in model.layers)
    if max(neurons, cells) > NEURONS_MAX:
        raise CorruptionError(f"the catalog is damaged: {model.name!r} of {neurons} neurons in {cells} cells")
    files_bytes = [model.bundles_file_bytes, model.resident_file_bytes]
    files_bytes += [file.size_bytes for file in model.calibration.files]
    if max(files_bytes) > FILE_BYTES_MAX:
        raise CorruptionError(f"the catalog is damaged: {model.name!r} has a file of {max(files_bytes)} bytes")


def _open(path: Path, write: bool, create: bool) -> lmdb.Environment:
    def opened(lock: bool) -> lmdb.Environment:
        own_path = os.fsencode(path)  # lmdb refuses a str that the locale cannot encode
        return lmdb.open(own_path, subdir=False, map_size=MAP_BYTES, readonly=not write, create=create, lock=lock)

    try:
        return opened(lock=True)
    except (lmdb.ReadonlyError, lmdb.LockError, PermissionError):
        if write:
            raise
        return opened(lock=False)  # the store is on a read-only mount, so nobody writes it


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (lmdb.MapFullError, lmdb.DiskError) as error:  # DiskError is ENOSPC
        raise SpaceError(f"no space left for the catalog {path}: {error}") from error
    except lmdb.Error as error:
        raise StoreError(f"cannot use the catalog {path}: {error}") from error
