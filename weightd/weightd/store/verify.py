"""Compares every byte of a model with its checksums. Files are read past the page cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weightd import _native
from weightd.disk.read_ahead import CHUNK_BYTES, Extent, ReadAhead
from weightd.errors import CorruptionError
from weightd.store.calibration import calibration_path
from weightd.store.checked_file import check_files
from weightd.store.layout import native_shape
from weightd.store.store import Store
from weightd_proto import weightd_pb2
from weightd_proto.encodings import bundles_in
from weightd_proto.tables import with_tables

Progress = Callable[[int, int], None]  # bytes read since the last call, bytes to read in all


@dataclass(frozen=True)
class Verified:
    """What was read and found whole."""

    model: str
    bundles: int
    rows: int  # of tables
    tensors: int
    files: int
    read_bytes: int


@dataclass(frozen=True)
class _Cells:
    """A run of cells: positions [begin, end) of a layer of a model or table."""

    record: weightd_pb2.Model
    layer: int
    begin: int
    end: int
    extent: Extent


@dataclass(frozen=True)
class _Piece:
    """Bytes with one checksum: a resident tensor, or a file of the calibration."""

    name: str
    checksum: int
    extents: list[Extent]
    advice: str


def verify_model(store: Store, name: str, allow_buffered: bool = False, progress: Progress | None = None) -> Verified:
    """CorruptionError names the model, and the neuron (with its layer), row (with its table), tensor or file of the
    first difference."""
    model = store.model(name)
    stored = with_tables(model)
    resident = store.resident_path(name)
    for record in stored:
        _check_size(model, store.bundles_path(record.name), record.bundles_file_bytes)
    _check_size(model, resident, model.resident_file_bytes)
    cells = [run for record in stored for run in _cells(record, store.bundles_path(record.name))]
    pieces = [*_tensors(model, resident), *_calibration(store, model)]
    extents = [run.extent for run in cells] + [extent for piece in pieces for extent in piece.extents]
    total_bytes = sum(extent.size_bytes for extent in extents)
    with ReadAhead(extents, direct_only=not allow_buffered) as read_ahead:
        taker = _Taker(read_ahead, total_bytes, progress)
        for run in cells:
            _check_bundles(store, run, taker)
        for piece in pieces:
            _check_piece(model, piece, taker)
    for record in stored:
        _check_placement(store, record)
    check_files(store, model)
    files_bytes = sum(file.size_bytes for file in model.files)
    bundles = sum(bundles_in(model.bundle, layer) for layer in model.layers)
    rows = sum(table.layers[0].neurons for table in model.tables)
    files = len(model.files) + len(model.calibration.files)
    return Verified(name, bundles, rows, len(model.resident), files, total_bytes + files_bytes)


class _Taker:
    def __init__(self, read_ahead: ReadAhead, total_bytes: int, progress: Progress | None) -> None:
        self._read_ahead = read_ahead
        self._total_bytes = total_bytes
        self._progress = progress

    def take(self, extent: Extent, use: Callable[[np.ndarray[tuple[int], np.dtype[np.uint8]]], None]) -> None:
        with self._read_ahead.take(extent) as data:
            use(np.frombuffer(data, np.uint8))
        if self._progress is not None:
            self._progress(extent.size_bytes, self._total_bytes)


def _check_size(model: weightd_pb2.Model, path: Path, size_bytes: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size_bytes:
        state = "missing" if found is None else f"{found} bytes long"
        raise CorruptionError(f"model {model.name}: {path} is {state}, expected {size_bytes} bytes; import it again")


def _cells(model: weightd_pb2.Model, path: Path) -> Iterator[_Cells]:
    layout = model.bundle
    cells_at_once = max(1, CHUNK_BYTES // layout.cell_bytes)
    for index, layer in enumerate(model.layers):
        for cell in range(0, layer.cells, cells_at_once):
            cells = min(cells_at_once, layer.cells - cell)
            begin = cell * layout.bundles_per_cell
            end = min(bundles_in(layout, layer), begin + cells * layout.bundles_per_cell)
            offset_bytes = layer.offset_bytes + cell * layout.cell_bytes
            yield _Cells(model, index, begin, end, Extent(path, offset_bytes, cells * layout.cell_bytes))


def _tensors(model: weightd_pb2.Model, path: Path) -> Iterator[_Piece]:
    for tensor in model.resident:
        extents = _extents(path, tensor.offset_bytes, tensor.size_bytes)
        yield _Piece(f"tensor {tensor.name}", tensor.checksum, extents, "import it again")


def _calibration(store: Store, model: weightd_pb2.Model) -> Iterator[_Piece]:
    for file in model.calibration.files:
        path = calibration_path(store, model.name, model.calibration.version) / file.name
        _check_size(model, path, file.size_bytes)
        extents = _extents(path, 0, file.size_bytes)
        yield _Piece(f"calibration file {file.name}", file.checksum, extents, "calibrate it again")


def _extents(path: Path, offset_bytes: int, size_bytes: int) -> list[Extent]:
    begins = range(0, size_bytes, CHUNK_BYTES)
    return [Extent(path, offset_bytes + begin, min(CHUNK_BYTES, size_bytes - begin)) for begin in begins]


def _check_bundles(store: Store, run: _Cells, taker: _Taker) -> None:
    model = run.record
    found = np.empty(run.end - run.begin, np.uint64)
    taker.take(run.extent, lambda cells: _native.checksum_bundles(native_shape(model.bundle), cells, found))
    expected = store.checksums(model.name, run.layer)[run.begin : run.end]
    wrong = np.flatnonzero(found != expected)
    if len(wrong):
        raise store.corrupt_bundle(model.name, run.layer, run.begin + int(wrong[0]))


def _check_placement(store: Store, model: weightd_pb2.Model) -> None:
    for index, layer in enumerate(model.layers):
        if not np.array_equal(np.sort(store.placement(model.name, index)), np.arange(bundles_in(model.bundle, layer))):
            raise CorruptionError(f"model {model.name}, layer {index}: its placement is damaged; import it again")


def _check_piece(model: weightd_pb2.Model, piece: _Piece, taker: _Taker) -> None:
    checksum = _native.Checksum()
    for extent in piece.extents:
        taker.take(extent, checksum.update)
    if checksum.value != piece.checksum:
        raise CorruptionError(f"model {model.name}, {piece.name}: it differs from its checksum; {piece.advice}")
