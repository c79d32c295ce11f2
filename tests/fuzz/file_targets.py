"""Fuzz targets: other files that somebody else may have written or damaged.

Each target takes any bytes. It suppresses the one error class with which the reader refuses a file. Any other exception
is a finding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from random import Random

import numpy as np
from mutators import Mutator, change_message, safetensors
from tiny_store import write_model

from flashclient.errors import CalibrationError
from flashclient.model.predictor_file import read_predictors
from weightd._native import EngineThread
from weightd.errors import DeviceError, SpaceError, StoreError, UsageError
from weightd.machine.pressure import Triggers
from weightd.serving.config import load_config
from weightd.serving.serve import _engine
from weightd.serving.served_models import _open, demand_of
from weightd.store.catalog import _parsed
from weightd.store.store import CATALOG_FILE, CHECKSUMS, PLACEMENT, Store
from weightd_proto import weightd_pb2


@cache
def folder() -> Path:
    """One folder for all inputs of this process. It is not removed, so that a finding can be examined."""
    return Path(tempfile.mkdtemp(prefix="weightd-fuzz-"))


def _file(data: bytes) -> Path:
    path = folder() / "input"
    path.write_bytes(data)
    return path


def config_file(data: bytes) -> None:
    with suppress(UsageError):
        load_config(["--config", str(_file(data))], {})


def calibration_file(data: bytes) -> None:
    layout = weightd_pb2.BundleLayout(hidden_size=4)
    model = weightd_pb2.Model(
        name="m", compute_dtype="F32", bundle=layout, layers=[weightd_pb2.Layer(neurons=3)], import_id=b"i" * 16
    )
    aligned = np.zeros(-(-len(data) // 64) * 64 + 64, np.uint8)[: len(data)]
    aligned[:] = np.frombuffer(data, np.uint8)
    with suppress(CalibrationError):
        read_predictors(aligned, model)


@cache
def _store() -> Store:
    write_model(folder() / "store")
    return Store.open(folder() / "store", readonly=True)


@cache
def _served() -> tuple[Store, EngineThread]:
    """A store with one model, and an engine that opens models of it."""
    config = load_config(["--store", str(_store().path), "--io-engine", "threads", "--allow-buffered"])
    engine = _engine(config, 1 << 30, str(folder() / "data"), Triggers())
    return _store(), engine


def stop() -> None:
    """Ends the processes and threads that the targets keep running."""
    if _served.cache_info().currsize:
        _served()[1].close()
        _served.cache_clear()


_records = count()


def catalog_record(data: bytes) -> None:
    """The record of a model as a store of format 1 may hold it: without a checksum."""
    if next(_records) % 1000 == 999:  # an engine keeps the models that it has opened
        stop()
    store, engine = _served()
    with suppress(StoreError, DeviceError, SpaceError):
        record = _parsed(data)
        record.name = "tiny"
        demand_of(record)
        served = _open(store, engine, record)
        with suppress(MemoryError, OSError, RuntimeError):  # what the server turns into statuses
            engine.open_session(served.number, 2, -1)


@cache
def _catalog() -> bytes:
    path = folder() / "whole"
    for number in range(6):
        write_model(path, f"m{number}", layers=3, neurons=700, seed=number)
    with Store.open(path) as store:
        store.remove("m2")
    return (path / CATALOG_FILE).read_bytes()


def catalog_pages(data: bytes) -> None:
    """Each eight bytes name a place in the catalog and a new value; bytes left over truncate it.

    The catalog is refused, or its records are right.
    """
    content = bytearray(_catalog())
    for first in range(0, len(data) - 7, 8):
        at = int.from_bytes(data[first : first + 4], "little") % len(content)
        content[at : at + 4] = data[first + 4 : first + 8]
    if len(data) % 8 == 1:
        del content[len(content) * data[-1] // 256 :]
    path = folder() / "torn"
    path.mkdir(exist_ok=True)
    (path / CATALOG_FILE).write_bytes(content)
    with suppress(StoreError), Store.open(path, readonly=True) as store:
        for model in store.models():
            for layer in range(3):
                store.checksums(model.name, layer)
                assert store.placement(model.name, layer).tolist() == list(range(700))
            store.catalog.remove(model.name, (CHECKSUMS, PLACEMENT))


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (config_file, calibration_file, catalog_record, catalog_pages)
}
CALIBRATION_KEYS = [
    "__metadata__", "format", "format_version", "import_id", "kind", "sign", "low_rank", "layers.0.input",
    "layers.0.output", "layers.0.bias", "layers.0.scale", "layers.0.signs", "layers.0.margin", "F32", "I8", "U8", "I32",
]  # fmt: skip


def _mutate_record(record: weightd_pb2.Model, random: Random) -> bytes:
    change_message(record, random)
    return record.SerializeToString()


MUTATORS: dict[str, Mutator] = {
    "calibration_file": safetensors(CALIBRATION_KEYS),
    "catalog_record": Mutator(weightd_pb2.Model.FromString, _mutate_record),
}
