"""The models that the daemon serves: records of the catalog, opened in the engine.

A model that is imported while the daemon runs is opened when it is first requested. `weightd rm` asks the daemon to
remove a model, which it does unless somebody uses it. An import that another one has replaced in the store stays open
for those who use it, and is opened for nobody else.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from weightd import _native
from weightd._native import PAGE_BYTES, SEGMENT_BYTES_MAX, EngineThread, ModelSpec, sector_size_bytes
from weightd.errors import (
    CorruptionError,
    DeviceError,
    InUseError,
    SpaceError,
    StoreError,
    UnknownModelError,
    WeightdError,
)
from weightd.machine.budget import GrowingDram, ModelDemand
from weightd.sizes import round_up
from weightd.store.calibration import CalibrationStaging, calibration_path, predictors_of, remove_old
from weightd.store.checked_file import check_files
from weightd.store.hotness import Hotness, calibrated_hotness, known_hotness
from weightd.store.store import Store
from weightd_proto import weightd_pb2
from weightd_proto.encodings import bundles_in, has_experts
from weightd_proto.tables import model_of, module_of, with_tables

logger = logging.getLogger(__name__)

# A Fetch looks placements up. They take 4 bytes per neuron: 64 layers of 28672 are 7 MB of the interpreter's 150.
PLACEMENTS_KEPT = 64
OPENERS_AT_START = 8  # models opened at once, so that a device that hangs does not delay other models
# After this time without an answer, callers that can go on without the device do so. A healthy device takes
# milliseconds; a disk that wakes up or a link that fails over takes seconds.
ANSWER_WITHIN_S = 30.0
# The default --dram leaves room for the predictors of a future calibration beside those of open sessions. Predictors
# whose rank is a sixteenth of the width take a sixteenth of the bundles' bytes; small models need room for headers and
# pages.
CALIBRATION_SHARE = 16
CALIBRATION_BYTES = 2 << 20


@dataclass(frozen=True)
class ServedModel:
    """A record of a model or table, and its number in the engine."""

    record: weightd_pb2.Model
    number: int


class ServedModels:
    """All models of `store`, by name. Safe to use from several threads. Opening one model does not delay others."""

    def __init__(
        self,
        store: Store,
        engine: EngineThread,
        dram: GrowingDram,
        cold_start: bool = False,
    ) -> None:
        """`cold_start`: the engine is not seeded with hotness."""
        self._store = store
        self._engine = engine
        self._dram = dram
        self._cold_start = cold_start
        self._lock = threading.Lock()  # guards _opened and _changing; never held while the device is read
        self._opened: dict[str, ServedModel] = {}
        self._changing: defaultdict[str, threading.Lock] = defaultdict(
            threading.Lock
        )  # held to open or publish a model
        self._replaced: list[ServedModel] = []  # by other imports, still in use; guarded by _lock
        self._remembered: dict[str, int] = {}  # checksum of the last saved hotness
        self.positions = lru_cache(maxsize=PLACEMENTS_KEPT)(self._positions)

    def names(self) -> list[str]:
        """The names that are in the store now."""
        return self._store.names()

    def open_all(self, within_s: float) -> None:
        """Opens all models of the store. Logs those that are damaged, or whose device gives no answer for `within_s`.

        Raises what open() raises if no model can be opened and corruption is not the reason. Corruption does not end
        the daemon: calls for the model fail until it is repaired.
        """
        failed: list[WeightdError] = []
        names = self.names()
        threads = ThreadPoolExecutor(OPENERS_AT_START, thread_name_prefix="weightd-start")
        openings = [threads.submit(self._open, name) for name in names]
        silent = wait(openings, within_s).not_done
        threads.shutdown(wait=False)
        for name, opening in zip(names, openings, strict=True):
            if opening in silent:
                unanswered = f"its device has not answered for {within_s:g} s"
                why = unanswered if opening.running() else "other models are opened first"
                logger.error("model %s is not served yet: %s", name, why)
                continue
            try:
                opening.result()
            except (StoreError, DeviceError) as error:
                failed.append(error)
        lost = [error for error in failed if not isinstance(error, CorruptionError)]
        if lost and len(failed) == len(names):
            raise lost[0]
        for refusal in failed:
            logger.error("%s", refusal)

    def opened(self, name: str) -> ServedModel | None:
        """The model or table if it is open, without waiting."""
        return self._opened.get(name)

    def opened_table(self, name: str) -> ServedModel:
        """A table of an open model. Raises UnknownModelError if the model has no such table."""
        served = self._opened.get(name)
        if served is None:
            raise UnknownModelError(f"model {model_of(name)!r} has no table {module_of(name)!r}")
        return served

    def require_known(self, name: str, listed: Callable[[str], bool]) -> None:
        """Raises UnknownModelError, which lists the models for which `listed` is true."""
        names = self.names()
        if name not in names:
            known = ", ".join(filter(listed, names))
            raise UnknownModelError(f"no model {name!r}: there is {known or 'none yet'}")

    def open(self, name: str) -> ServedModel:
        """Opens a model that was imported since the start, with its tables. Waits if another thread is opening it.

        Raises StoreError, DeviceError (no O_DIRECT), SpaceError.
        """
        served = self._open(name)
        logger.info("opened model %s, imported since the start", name, extra={"fields": {"model": name}})
        return served

    def _open(self, name: str) -> ServedModel:
        with self._changes(name):
            served = self._opened.get(name)
            if served is not None:
                return served
            record = self._store.model(name)
            check_files(self._store, record)
            self._engine.raise_dram(*self._dram.with_model(demand_of(record)))
            for stored in (*record.tables, record):  # whoever finds the model finds its tables
                if stored.name not in self._opened:
                    served = self._open_record(stored)
            assert served is not None
            return served

    def _open_record(self, record: weightd_pb2.Model) -> ServedModel:
        served = _open(self._store, self._engine, record)
        self._seed(served.number, known_hotness(self._store, record))
        self._remembered[record.name] = _checksum(self._engine.hotness(served.number))
        with self._lock:
            self._opened[record.name] = served
        return served

    def remove(self, name: str) -> None:
        """Closes the model and its tables and deletes it from the store.

        Raises UnknownModelError if there is none, InUseError while somebody uses it, StoreError.
        """
        with self._changes(name):
            self.require_known(name, lambda _: True)
            record = self._store.model(name)
            for stored in (record, *record.tables):  # whoever uses a table uses its model
                served = self._opened.get(stored.name)
                if served is None:
                    continue
                if not self._engine.remove_model(served.number):
                    raise InUseError(f"model {name!r} is in use: end its clients, or try again when they have ended")
                with self._lock:
                    del self._opened[stored.name]
                    self._remembered.pop(stored.name, None)
            self.positions.cache_clear()  # another model may get the name
            self._store.remove(name, by_daemon=True)
        logger.info("removed model %s", name, extra={"fields": {"model": name}})

    def close_replaced(self, name: str) -> None:
        """Closes imports of the model that another one has replaced in the store: whoever asks from now on gets that.

        Those that are in use are closed later. Raises StoreError.
        """
        try:
            self._set_replaced_aside(name)
        finally:
            self.close_unused()

    def _set_replaced_aside(self, name: str) -> None:
        with self._changes(name):
            current = self._store.model(name).import_id
            old = [one for one in list(self._opened.values()) if model_of(one.record.name) == name]
            old = [one for one in old if one.record.import_id != current]
            with self._lock:
                for served in old:
                    del self._opened[served.record.name]
                    self._remembered.pop(served.record.name, None)
                self._replaced += sorted(old, key=lambda one: one.record.name != name)  # a model before its tables
            self.positions.cache_clear()
        if old:
            logger.info("model %s was imported again", name, extra={"fields": {"model": name}})

    def close_all_replaced(self) -> None:
        """Closes imports that others have replaced in the store, should nobody have told us."""
        with self._lock:
            names = {model_of(name) for name in self._opened}
        for name in sorted(names):
            try:
                self._set_replaced_aside(name)
            except StoreError as error:
                logger.warning("cannot tell whether %s was imported again: %s", name, error)
        self.close_unused()

    @property
    def has_replaced(self) -> bool:
        return bool(self._replaced)

    def close_unused(self) -> None:
        """Closes imports that were replaced, and that nobody uses any more."""
        with self._lock:
            replaced, self._replaced = self._replaced, []
        try:
            in_use = [served for served in replaced if not self._engine.remove_model(served.number)]
        except _native.Stopping:
            return
        with self._lock:
            self._replaced += in_use

    def _changes(self, name: str) -> threading.Lock:
        with self._lock:
            return self._changing[name]

    def stage(self, served: ServedModel, offered: weightd_pb2.Calibration) -> CalibrationStaging:
        """Makes a folder for the files of a new calibration. Raises RequestError, StoreError, SpaceError."""
        self._store.clean()
        return CalibrationStaging(self._store, served.record, offered)

    def publish(self, served: ServedModel, staging: CalibrationStaging) -> weightd_pb2.Calibration:
        """Publishes the staged calibration. Sessions that open from now on use it.

        Raises RequestError, SpaceError, and StoreError if the model was removed or imported again meanwhile.
        """
        name = served.record.name
        with self._changes(name):
            now = self._opened.get(name)
            if now is None or now.number != served.number:
                raise StoreError(
                    f"{name!r} was removed or imported again meanwhile: calibrate the model that is there now"
                )
            calibration = staging.publish()
            record = self._store.model(name)
            with self._lock:
                self._opened[record.name] = ServedModel(record, served.number)
            _offer_predictors(self._store, self._engine, record, served.number)
            self._seed(served.number, calibrated_hotness(self._store, record))
            remove_old(self._store, record)
        return calibration

    def _seed(self, number: int, hotness: Hotness | None) -> None:
        if hotness is not None and not self._cold_start:
            self._engine.seed(number, hotness)

    def remember(self) -> None:
        """Saves the hotness of each model's cells in the catalog, a byte per cell, if it has changed.

        Imports that were replaced are closed, should nobody have told us.
        """
        with self._lock:
            opened = list(self._opened.values())
        for served in opened:
            name = served.record.name
            try:
                self._set_replaced_aside(model_of(name))
                hotness = self._engine.hotness(served.number)
                with self._changes(name):
                    now = self._opened.get(name)
                    if now is None or now.number != served.number:  # removed meanwhile
                        continue
                    if _checksum(hotness) != self._remembered[name]:
                        self._store.catalog.set_hotness(name, hotness)
                        self._remembered[name] = _checksum(hotness)
            except _native.Stopping:
                return
            except (SpaceError, StoreError) as error:
                logger.warning("cannot save the hotness of %s: %s", name, error)
        self.close_unused()

    def placement(self, name: str, layer: int) -> npt.NDArray[np.uint32]:
        """The neuron at each position of the layer."""
        return self._store.placement(name, layer)

    def _positions(self, name: str, layer: int) -> npt.NDArray[np.uint32]:
        """The position of each neuron of the layer: the inverse of its placement."""
        placement = self._store.placement(name, layer)
        positions = np.empty_like(placement)
        positions[placement] = np.arange(len(placement), dtype=np.uint32)
        return positions


def demand_of(model: weightd_pb2.Model) -> ModelDemand:
    """How much of --dram the model needs, with its tables."""
    demands = [_demand_of_record(record) for record in with_tables(model)]
    # The pool of each table may leave a part of a segment unused.
    unused_bytes = sum(min(SEGMENT_BYTES_MAX, table.bundles_file_bytes) for table in model.tables)
    minimum_bytes = sum(demand.minimum_bytes for demand in demands) + unused_bytes
    full_bytes = sum(demand.full_bytes for demand in demands) + unused_bytes
    return ModelDemand(model.name, minimum_bytes, full_bytes, sum(demand.catalog_bytes for demand in demands))


def _demand_of_record(model: weightd_pb2.Model) -> ModelDemand:
    cells = sum(layer.cells for layer in model.layers)
    bundles = sum(bundles_in(model.bundle, layer) for layer in model.layers)
    cell_bytes = model.bundle.cell_bytes
    predictors = predictors_of(model.calibration)
    predictors_bytes = 0 if predictors is None else round_up(predictors.size_bytes, PAGE_BYTES)
    resident_bytes = model.resident_file_bytes + predictors_bytes
    experts = ranges_of(model)
    minimum_bytes = EngineThread.minimum_dram_bytes(resident_bytes, cell_bytes, cells, bundles, experts)
    bundles_bytes = cells * cell_bytes
    calibration_bytes = 0 if module_of(model.name) else bundles_bytes // CALIBRATION_SHARE + CALIBRATION_BYTES
    full_bytes = minimum_bytes + bundles_bytes + calibration_bytes
    return ModelDemand(model.name, minimum_bytes, full_bytes, EngineThread.catalog_bytes(cells, bundles))


def ranges_of(model: weightd_pb2.Model) -> int:
    """For a model with experts, its experts and its layers without experts; 0 for other models."""
    return sum(max(1, layer.experts) for layer in model.layers) if has_experts(model) else 0


def model_spec(store: Store, record: weightd_pb2.Model) -> ModelSpec:
    """The record as the engine takes it."""
    name, bundle = record.name, record.bundle
    return ModelSpec(
        name=name,
        bundles_path=str(store.bundles_path(name)),
        resident_path=str(store.resident_path(name)),
        resident_bytes=record.resident_file_bytes,
        cell_bytes=bundle.cell_bytes,
        stride_bytes=bundle.stride_bytes,
        bundle_bytes=bundle.bundle_bytes,
        bundles_per_cell=bundle.bundles_per_cell,
        is_table=bool(module_of(name)),
        layers=[(each.offset_bytes, bundles_in(bundle, each), each.cells, each.experts) for each in record.layers],
        checksums=[store.checksums(name, layer) for layer in range(len(record.layers))],
        tensors=[(tensor.name, tensor.offset_bytes, tensor.size_bytes, tensor.checksum) for tensor in record.resident],
    )


def _open(store: Store, engine: EngineThread, record: weightd_pb2.Model) -> ServedModel:
    try:
        sector_bytes = sector_size_bytes(store.bundles_path(record.name))
        if record.bundle.cell_bytes % sector_bytes:
            raise StoreError(
                f"{record.name} has cells of {record.bundle.cell_bytes} bytes, but the device of {store.path} reads "
                f"{sector_bytes} bytes at a time: import the model again on this device"
            )
        number = engine.add_model(model_spec(store, record))
    except OSError as error:
        raise DeviceError(f"cannot open model {record.name!r} for direct reading: {error}{_advice(error)}") from error
    except ValueError as error:
        raise StoreError(f"{error}; `weightd verify` shows more; import the model again") from error
    except MemoryError as error:
        raise SpaceError(str(error)) from error
    _offer_predictors(store, engine, record, number)
    remove_old(store, record)
    return ServedModel(record, number)


def _offer_predictors(store: Store, engine: EngineThread, record: weightd_pb2.Model, number: int) -> None:
    file = predictors_of(record.calibration)
    if file is not None:
        path = calibration_path(store, record.name, record.calibration.version) / file.name
        engine.set_predictors(number, str(path), file.size_bytes, file.checksum, record.calibration.version)


def _checksum(data: bytes) -> int:
    return int(_native.checksum(np.frombuffer(data, np.uint8)))


def _advice(error: OSError) -> str:
    if error.errno == 22:  # EINVAL: the file system does not support O_DIRECT
        return "; move the store to ext4 or xfs, or give --allow-buffered"
    return ""
