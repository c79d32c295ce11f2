"""The catalog of a store: an LMDB environment in one file. The keys are in the docstring of store.py.

LMDB refuses to open an environment twice in one process and must not be carried across fork. Operations on a
catalog are rare and short, so each opens it anew, and threads of one process take turns.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import lmdb
import numpy as np
import numpy.typing as npt

from weightd.errors import SpaceError, StoreError
from weightd_proto import weightd_pb2

MAGIC = "weightd-store"
FORMAT_VERSION = 1
META_KEY = b"meta"
DEVICE_PROFILE_KEY = b"device_profile"
MODEL_PREFIX = b"model/"
# Address space, not memory or disk: the file grows as it is filled. A neuron costs 12 bytes (checksum, placement), so
# a 70B model (80 layers of 28672) costs 27 MB and this holds more than two thousand of them.
MAP_BYTES = 64 << 30

_turn = threading.Lock()


def calibration_key(model: str) -> bytes:
    return f"calibration/{model}".encode()


def hotness_key(model: str) -> bytes:
    return f"hotness/{model}".encode()


def array_key(kind: str, model: str, layer: int) -> bytes:
    return f"{kind}/{model}/{layer:05d}".encode()


class Catalog:
    """Reads and writes the catalog at `path`. Every method is one transaction."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        """Writes the meta record if there is none: also completes a creation that was killed."""
        with self._transaction(write=True, create=True) as transaction:
            if transaction.get(META_KEY) is None:
                meta = {"magic": MAGIC, "format_version": FORMAT_VERSION}
                transaction.put(META_KEY, json.dumps(meta).encode())

    def check(self) -> None:
        """StoreError unless this is a catalog of our format, of a version that we know."""
        with self._transaction() as transaction:
            record = transaction.get(META_KEY)
        meta = json.loads(bytes(record)) if record is not None else {}
        if meta.get("magic") != MAGIC:
            raise StoreError(f"not a weightd store: {self.path} lacks the store's record")
        if meta["format_version"] > FORMAT_VERSION:
            raise StoreError(
                f"store of format {meta['format_version']}, this weightd knows up to {FORMAT_VERSION}: "
                f"upgrade weightd to use {self.path.parent}"
            )

    def models(self) -> list[weightd_pb2.Model]:
        """By name, each with its newest calibration."""
        with self._transaction() as transaction:
            cursor = transaction.cursor()
            found = cursor.set_range(MODEL_PREFIX)
            records = []
            while found and bytes(cursor.key()).startswith(MODEL_PREFIX):
                records.append(_model(transaction, bytes(cursor.value())))
                found = cursor.next()
        return records

    def model(self, name: str) -> weightd_pb2.Model | None:
        with self._transaction() as transaction:
            record = transaction.get(MODEL_PREFIX + name.encode())
            return None if record is None else _model(transaction, bytes(record))

    def set_calibration(self, model: str, calibration: weightd_pb2.Calibration) -> None:
        """In the place of the one there was."""
        with self._transaction(write=True) as transaction:
            transaction.put(calibration_key(model), calibration.SerializeToString())

    def hotness(self, model: str) -> bytes | None:
        with self._transaction() as transaction:
            record = transaction.get(hotness_key(model))
        return None if record is None else bytes(record)

    def set_hotness(self, model: str, hotness: bytes) -> None:
        """In the place of what there was."""
        with self._transaction(write=True) as transaction:
            transaction.put(hotness_key(model), hotness)

    def array(self, kind: str, model: str, layer: int) -> bytes | None:
        with self._transaction() as transaction:
            record = transaction.get(array_key(kind, model, layer))
        return None if record is None else bytes(record)

    def add(self, model: weightd_pb2.Model, arrays: Mapping[str, list[npt.NDArray[np.generic]]]) -> None:
        """The model and its arrays per layer (kind -> one array per layer), all or nothing."""
        with self._transaction(write=True) as transaction:
            for kind, layers in arrays.items():
                for index, values in enumerate(layers):
                    transaction.put(array_key(kind, model.name, index), values.tobytes())
            transaction.put(MODEL_PREFIX + model.name.encode(), model.SerializeToString())

    def remove(self, name: str, kinds: tuple[str, ...]) -> None:
        with self._transaction(write=True) as transaction:
            record = transaction.pop(MODEL_PREFIX + name.encode())
            assert record is not None, "looked up under the store's lock"
            layers = len(weightd_pb2.Model.FromString(bytes(record)).layers)
            transaction.delete(calibration_key(name))
            transaction.delete(hotness_key(name))
            for kind in kinds:
                for index in range(layers):
                    transaction.delete(array_key(kind, name, index))

    def device_profile(self) -> str | None:
        """What `weightd doctor` measured, as JSON, or None."""
        with self._transaction() as transaction:
            record = transaction.get(DEVICE_PROFILE_KEY)
        return None if record is None else bytes(record).decode()

    def set_device_profile(self, profile: str) -> None:
        with self._transaction(write=True) as transaction:
            transaction.put(DEVICE_PROFILE_KEY, profile.encode())

    @contextmanager
    def _transaction(self, write: bool = False, create: bool = False) -> Iterator[lmdb.Transaction]:
        with _turn, _translated(self.path), _open(self.path, write, create) as environment:
            if write:
                environment.reader_check()  # frees the reader slots of processes that were killed
            with environment.begin(write=write) as transaction:
                yield transaction


def _model(transaction: lmdb.Transaction, record: bytes) -> weightd_pb2.Model:
    model = weightd_pb2.Model.FromString(record)
    calibration = transaction.get(calibration_key(model.name))
    if calibration is not None:
        model.calibration.MergeFromString(bytes(calibration))
    return model


def _open(path: Path, write: bool, create: bool) -> lmdb.Environment:
    def opened(lock: bool) -> lmdb.Environment:
        return lmdb.open(str(path), subdir=False, map_size=MAP_BYTES, readonly=not write, create=create, lock=lock)

    try:
        return opened(lock=True)
    except (lmdb.ReadonlyError, lmdb.LockError, PermissionError):
        if write:
            raise
        return opened(lock=False)  # a store on a read-only mount: nobody writes it


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (lmdb.MapFullError, lmdb.DiskError) as error:  # DiskError is ENOSPC
        raise SpaceError(f"no space left for the catalog {path}: {error}") from error
    except lmdb.Error as error:
        raise StoreError(f"cannot use the catalog {path}: {error}") from error
