"""The store: a folder of models in bundled row-column layout. Format version 4.

    STORE/catalog.mdb                    LMDB environment in one file (catalog.mdb-lock beside it is LMDB's own)
    STORE/weightd.lock                   flock of the daemon that serves the store (daemon_lock.py)
    STORE/<model>/bundles.bin            layers back to back
    STORE/<model>/resident.safetensors   every weight outside the FFN matrices and the tables
    STORE/<model>/<table>/bundles.bin    rows of an embedding that is not resident; the folder is named after its module
    STORE/<model>/hf/                    config.json, generation_config.json, tokenizer files
    STORE/<model>/calibration/<version>/ what was measured on the model (calibration.py)
    STORE/.import-*, STORE/.removed-*    an import or calibration under way, a folder being deleted

- All numbers are little endian. block_bytes = max(4096, what statx reports for direct I/O); the catalog has it.
- A bundle holds one neuron: [gate row][up row][down column], or [up row][down column] in OPT, back to back, with
  hidden_size values each. Each part has an encoding (encodings.py): plain F32, BF16 or F16, or blocks with scales. FFN
  biases are resident.
- Or a bundle is a slab, of slab_neurons: [gate rows][up rows][down values], where down is [hidden_size, slab_neurons].
  What is said of neurons below is then said of slabs. Slabs of a layer may have encodings of their own; bundle_bytes is
  the size of the largest. A layer has whole slabs.
- Bundles lie at multiples of stride_bytes (bundle_bytes rounded up to 64) in a cell. A cell is one block with
  bundles_per_cell = block_bytes // stride_bytes bundles. If not even one fits, a cell is one bundle padded to whole
  blocks. Cells of quantised bundles are padded to sectors instead: max(512, what statx reports for direct I/O), or
  block_bytes where it reports nothing. They hold as many bundles, up to block_bytes // stride_bytes, as waste least.
- A layer is ceil(neurons / bundles_per_cell) cells in order of placement: position p holds neuron placement[p]. Layers
  begin on block boundaries. All padding is zero.
- A table is stored like a model with one layer (Model.tables in proto/weightd.proto): its bundles are rows, in their
  own order and in a layout of their own. So rows that are smaller than half a block share a cell.
- resident.safetensors is a valid safetensors file whose data begin on a block boundary (spaces pad the header). Names
  are those of transformers' state_dict without the FFN matrices and tables, and so are shapes but for matrices in
  blocks: those are U8 [rows, bytes of a row], and the record has their format and shape. A tied head is stored once.
  Other tensors have the compute dtype, F32 where transformers keeps it, or their own dtype if they are integers. Their
  order aligns each to 64 bytes as far as sizes allow.
- Catalog keys: `meta` -> JSON {"magic": "weightd-store", "format_version": 4}; `model/<name>` -> weightd.v1.Model;
  `checksums/<name>/<layer:05d>` -> XXH3-64 of each bundle's bundle_bytes, u64 by position;
  `placement/<name>/<layer:05d>` -> u32 neuron at each position; `calibration/<name>` -> weightd.v1.Calibration, the
  newest; `hotness/<name>` -> a byte for each cell (hotness.py); `device_profile` -> JSON, what doctor measured.
  For a table, <name> is that of its record in the last four, <model>/<table>.
  Every value but that of `meta` ends in 8 more bytes, the XXH3-64 of key and value. Opening a store also checks the
  pages of the catalog (catalog_pages.py).
- Older formats are read, and stay as they are until the next import, which makes the store one of format 4. Format 3
  has no tables. Format 2 has one dtype for all parts and for computing, instead of encodings. Format 1 has no checksums
  of values either.
- Publishing: the import writes into .import-<random>, syncs, renames it to <model>, then adds it to the catalog in one
  transaction. A folder with a file `.unpublished` is a model only if the catalog says so. Leftovers of a dead import or
  rm have that file or such a folder name, and nobody holds the flock of the file. The next import deletes them.

Refused: a folder without a catalog, a catalog of another kind or of a newer format, a model name that is not one
plain path component, publishing over an existing model, removing past the daemon that serves the store, a second
daemon.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightd.closing import Closing
from weightd.disk.gguf_names import without_suffix
from weightd.errors import CorruptionError, ImportingError, StoreError
from weightd.store.catalog import Arrays, Catalog
from weightd.store.daemon_lock import DaemonLock
from weightd.store.origin import hub_name_of
from weightd.store.staged_folder import (
    MARKER_FILE,
    REMOVED_PREFIX,
    STAGED_PREFIX,
    StagedFolder,
    delete,
    is_folder,
    is_held,
    marker_of,
    set_aside,
    sync,
)
from weightd_proto import weightd_pb2
from weightd_proto.encodings import bundle_neurons, bundles_in
from weightd_proto.files import BUNDLES_FILE, DAEMON_LOCK_FILE
from weightd_proto.tables import model_of, module_of

CATALOG_FILE = "catalog.mdb"
RESIDENT_FILE = "resident.safetensors"
FILES_FOLDER = "hf"
CHECKSUMS = "checksums"
PLACEMENT = "placement"
NAME_BYTES_MAX = 200  # LMDB keys end at 511 bytes
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
# Names that the store itself uses.
_RESERVED = {CATALOG_FILE, f"{CATALOG_FILE}-lock", DAEMON_LOCK_FILE}


def check_model_name(name: str) -> str:
    """Returns `name`. StoreError unless it is one plain path component of letters, digits and _.+- ."""
    if not _NAME.fullmatch(name) or len(name) > NAME_BYTES_MAX or name in _RESERVED:
        raise StoreError(
            f"not a model name: {name!r}, use up to {NAME_BYTES_MAX} letters, digits and _.+- without a leading dot"
        )
    return name


def model_name_for(path: Path) -> str:
    """The name of the checkpoint at `path` in a store, unless --name gives another one.

    It is the name of the folder or of the .gguf file, without the number of a part, with a dash for every character
    that no model name may have. A snapshot in the hub's cache has its name on the hub, without the organisation.
    """
    last = (hub_name_of(path) or path.name).rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9_.+-]", "-", without_suffix(last)).lstrip("-+.")[:NAME_BYTES_MAX]
    return name if name and name not in _RESERVED else f"model-{name}".rstrip("-")


class Store(Closing):
    """An existing store. `Store.open` opens it; close it, or use it in a `with` statement."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.catalog = Catalog(path / CATALOG_FILE)
        self._daemon_lock = DaemonLock(path)

    @classmethod
    def open(cls, path: Path | str, create: bool = False, readonly: bool = False) -> Store:
        """The store at `path`. With `create`, it is made if the folder is empty or missing.

        Unless `readonly`, leftovers of dead imports are deleted. StoreError if there is no store, if `path` holds
        something else, and for a newer format.
        """
        store = cls(Path(path))
        if create:
            store._create()
        if not (store.path / CATALOG_FILE).is_file():
            raise StoreError(f"no store at {store.path}: `weightd import SRC --store {store.path}` makes one")
        store.catalog.check()
        if not readonly:
            store.clean()
        return store

    @classmethod
    @contextmanager
    def made(cls, path: Path) -> Iterator[Store]:
        """The store at `path`, made if the folder is empty or missing. After an error a new store without models goes.

        Raises the errors of open().
        """
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        is_new = not (path / CATALOG_FILE).exists()
        with cls.open(path, create=True) as store:
            try:
                yield store
            except BaseException:
                if is_new:
                    store._unmake(missing)
                raise

    def close(self) -> None:
        """Gives back the daemon's lock, if it was claimed."""
        self._daemon_lock.close()

    # Contents

    def names(self) -> list[str]:
        return [model.name for model in self.models()]

    def models(self) -> list[weightd_pb2.Model]:
        return self.catalog.models()

    def model(self, name: str) -> weightd_pb2.Model:
        """The model's record with its newest calibration. StoreError for an unknown name lists the known ones."""
        model = self.catalog.model(name)
        if model is None:
            names = ", ".join(self.names()) or "none yet"
            raise StoreError(f"no model {name!r} in {self.path}: there is {names}")
        return model

    def checksums(self, name: str, layer: int) -> npt.NDArray[np.uint64]:
        """XXH3-64 of the layer's bundles, by position."""
        return np.frombuffer(self._array(CHECKSUMS, name, layer), dtype="<u8")

    def placement(self, name: str, layer: int) -> npt.NDArray[np.uint32]:
        """The neuron at each position of the layer."""
        return np.frombuffer(self._array(PLACEMENT, name, layer), dtype="<u4")

    def hotness(self, name: str) -> npt.NDArray[np.uint8] | None:
        """How often each cell is used, as the last daemon learned it (hotness.py). None if no daemon has served it."""
        try:
            record = self.catalog.hotness(name)
        except CorruptionError:
            return None  # the pool can learn it again
        return None if record is None else np.frombuffer(record, np.uint8)

    def bundles_path(self, name: str) -> Path:
        return self.path / name / BUNDLES_FILE

    def resident_path(self, name: str) -> Path:
        return self.path / name / RESIDENT_FILE

    def files_path(self, name: str) -> Path:
        return self.path / name / FILES_FOLDER

    def corrupt_bundle(self, name: str, layer: int, position: int, error: int = 0) -> CorruptionError:
        """The error for a bundle that cannot be read (`error`: its errno) or that differs from its checksum (0)."""
        number = int(self.placement(name, layer)[position])
        where = f"model {name}, layer {layer}, neuron {number}: the bundle"
        if not module_of(name) and (neurons := bundle_neurons(self.model(name).bundle)) > 1:
            first = number * neurons
            where = f"model {name}, layer {layer}, slab {number} (neurons {first} to {first + neurons - 1}): it"
        if module_of(name):
            where = f"model {model_of(name)}, table {module_of(name)}, row {number}: it"
        what = "differs from its checksum; import it again"
        if error:
            what = f"cannot be read: {os.strerror(error)}; check the device, or import it again"
        return CorruptionError(f"{where} {what}")

    def _array(self, kind: str, name: str, layer: int) -> bytes:
        record = self.catalog.array(kind, name, layer)
        if record is None:
            self.model(model_of(name))
            raise StoreError(f"model {name!r} in {self.path} has no {kind} of layer {layer}")
        return record

    # Changes

    def begin_import(self, name: str, replaces: bytes = b"") -> Staging:
        """Begins an import: returns a folder for the model's files. `replaces`: the import_id of the model to replace.

        StoreError if the name is taken or is no model name, ImportingError if another process is importing it.
        """
        check_model_name(name)
        self._create()  # again: the process that had made it may have removed it, because its own import failed
        with self.locked():
            self._refuse_taken(name, replaces)
            if marker_of(self.path, name) is not None:
                raise ImportingError(f"another process imports {name!r} into {self.path}: wait for it")
            return Staging(self, name, replaces)

    def await_import(self, name: str) -> None:
        """Waits until no other process imports this model."""
        marker = marker_of(self.path, name)
        if marker is not None:
            with suppress(FileNotFoundError), marker.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)

    def remove(self, name: str, by_daemon: bool = False) -> None:
        """Deletes the model; StoreError if there is none, or if a daemon serves the store and is not the caller."""
        with self.locked():  # a daemon claims the store under this lock too
            if not by_daemon:
                self._refuse_served(f"cannot remove {name!r}")
            self.model(name)
            removed = self.take_out(name)
        delete(removed)

    def take_out(self, name: str) -> Path:
        """Removes the model from the catalog. Returns its folder, to be deleted. The caller holds the store's lock."""
        folder = self.path / name
        if os.path.lexists(folder) and not is_folder(folder):
            removed = set_aside(self.path, folder)
            self.catalog.remove(name, (CHECKSUMS, PLACEMENT))
            return removed
        folder.mkdir(exist_ok=True)  # a record whose folder was deleted by hand can still be removed
        (folder / MARKER_FILE).touch()
        sync(folder)
        self.catalog.remove(name, (CHECKSUMS, PLACEMENT))
        return set_aside(self.path, folder)

    def clean(self) -> None:
        """Deletes what dead imports and removals left behind."""
        leftovers = []
        with self.locked():
            for folder in self.path.iterdir():
                # Other processes delete folders without the lock: those that they set aside, and their own.
                with suppress(FileNotFoundError):
                    if self._abandoned(folder):
                        leftovers.append(set_aside(self.path, folder))
        for folder in leftovers:
            delete(folder)

    def _abandoned(self, folder: Path) -> bool:
        if folder.name.startswith(REMOVED_PREFIX):
            return True
        marker = folder / MARKER_FILE
        staged = folder.name.startswith(STAGED_PREFIX)
        try:
            if not folder.is_dir() or not (staged or marker.exists()) or is_held(marker):
                return False
        except PermissionError:  # not a folder of the store: lost+found, or one of another user
            return False
        if self.catalog.model(folder.name) is not None:
            marker.unlink()  # an import was killed after its transaction, or an rm before its transaction
            return False
        return True

    def _refuse_taken(self, name: str, replaces: bytes) -> None:
        """StoreError unless the name is free, or belongs to the import that is to be replaced."""
        if replaces and self.model(name).import_id == replaces:
            return
        if self.catalog.model(name) is not None:
            raise StoreError(f"model {name!r} is already in {self.path}: rm it first, or import it as another --name")
        if os.path.lexists(self.path / name):
            raise StoreError(f"{self.path / name} is in the way and no model: move it, or import as another --name")

    def _unmake(self, folders: Sequence[Path]) -> None:
        """Removes the store if nothing is in it, and then those of `folders`, inner ones first, that are empty."""
        files = {CATALOG_FILE, f"{CATALOG_FILE}-lock"}
        with suppress(OSError, StoreError), self.locked():
            if {entry.name for entry in self.path.iterdir()} != files or self.names():
                return
            for name in files:
                (self.path / name).unlink()
            for folder in folders:
                folder.rmdir()

    def _create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with self.locked():
            # A killed creation may have left LMDB's files. lost+found is in the root of every ext4 file system.
            own = {CATALOG_FILE, f"{CATALOG_FILE}-lock", "lost+found"}
            foreign = [entry.name for entry in self.path.iterdir() if entry.name not in own]
            if not (self.path / CATALOG_FILE).exists() and foreign:
                raise StoreError(f"not a weightd store: {self.path} holds {foreign[0]!r}, choose an empty folder")
            if not foreign:
                self.catalog.create()
                sync(self.path)

    @contextmanager
    def locked(self, shared: bool = False) -> Iterator[None]:
        """Holds a flock of the store's folder. It serialises the short steps that add and remove folders."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    # The daemon

    def _refuse_served(self, cannot: str) -> None:
        """StoreError if a daemon serves the store. The caller holds the store's lock."""
        address = self._daemon_lock.holder()
        if address is not None:
            raise StoreError(f"{cannot}: a weightd at {address} serves {self.path}, stop it first")

    def claim(self, address: str) -> None:
        """Makes this process the daemon of the store, until `close`. StoreError names the pid of another."""
        with self.locked():
            self._daemon_lock.claim(address)

    def served_by(self) -> str | None:
        """The address of the daemon that serves the store, if one does."""
        with self.locked(shared=True):
            return self._daemon_lock.holder()


class Staging(StagedFolder):
    """An import under way: write into `folder`, then `publish`."""

    def __init__(self, store: Store, name: str, replaces: bytes) -> None:
        super().__init__(store.path)
        self.mark(name)
        self.store = store
        self.name = name
        self._replaces = replaces
        self._calibration = store.model(name).calibration.version if replaces else 0  # which the user knows of
        self._import_id = b""

    def close(self) -> None:
        """Deletes the folder unless it was published, even if an interrupt came between the catalog and `finish`."""
        if not self._published and self._import_id:
            published = self.store.catalog.model(self.name)
            if published is not None and published.import_id == self._import_id:
                self.finish()
        super().close()

    def publish(
        self,
        model: weightd_pb2.Model,
        checksums: Sequence[npt.NDArray[np.uint64]],
        of_tables: Sequence[npt.NDArray[np.uint64]] = (),
    ) -> None:
        """Makes the model part of the store, with neurons placed in their own order. The files must be synced already.

        `checksums`: per layer, one XXH3-64 per position; `of_tables`: per table, one per row. StoreError if the name
        was taken or the model to be replaced was calibrated meanwhile. A daemon that serves a model that is replaced
        closes it when it looks, or is told.
        """
        arrays = {model.name: _arrays(model, checksums)}
        for table, sums in zip(model.tables, of_tables, strict=True):
            arrays[table.name] = _arrays(table, [sums])
        replaced = []
        self._import_id = model.import_id
        with self.store.locked():
            self.store._refuse_taken(self.name, self._replaces)
            if self._replaces:
                self._refuse_calibrated()
                replaced.append(self.store.take_out(self.name))
            self.move(self.store.path / self.name)
            self.store.catalog.add(model, arrays)
            self.finish()
        for folder in replaced:
            delete(folder)

    def _refuse_calibrated(self) -> None:
        if self.store.model(self.name).calibration.version == self._calibration:
            return
        raise StoreError(
            f"{self.name!r} in {self.store.path} was calibrated meanwhile, and a new import would delete its "
            f"calibration: use the old import, remove it with `weightd rm {self.name} --store {self.store.path}`, or "
            "import the checkpoint under another name with `weightd import --name`"
        )


def _arrays(record: weightd_pb2.Model, checksums: Sequence[npt.NDArray[np.uint64]]) -> Arrays:
    placement = [np.arange(bundles_in(record.bundle, layer), dtype="<u4") for layer in record.layers]
    assert [len(sums) for sums in checksums] == [len(order) for order in placement]
    return {CHECKSUMS: [sums.astype("<u8", copy=False) for sums in checksums], PLACEMENT: placement}
