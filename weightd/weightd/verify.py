"""Checks every byte of a model against its checksums, read past the page cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weightd import _native
from weightd.errors import CorruptionError
from weightd.import_plan import CHUNK_BYTES
from weightd.layout import native_shape
from weightd.read_ahead import Extent, ReadAhead
from weightd.store import FILES_FOLDER, Store
from weightd_proto import weightd_pb2

Progress = Callable[[int, int], None]  # bytes read since the last call, bytes to read in all


@dataclass(frozen=True)
class Verified:
    """What was found whole."""

    model: str
    bundles: int
    tensors: int
    files: int
    read_bytes: int


@dataclass(frozen=True)
class _Cells:
    """Positions [begin, end) of a layer."""

    layer: int
    begin: int
    end: int
    extent: Extent


def verify_model(store: Store, name: str, allow_buffered: bool = False, progress: Progress | None = None) -> Verified:
    """Raises CorruptionError that names model, layer and neuron (or tensor, or file) of the first difference."""
    model = store.model(name)
    bundles, resident = store.bundles_path(name), store.resident_path(name)
    for path, size_bytes in ((bundles, model.bundles_file_bytes), (resident, model.resident_file_bytes)):
        _check_size(model, path, size_bytes)
    cells = list(_cells(model, bundles))
    pieces = [(tensor, list(_pieces(tensor, resident))) for tensor in model.resident]
    extents = [run.extent for run in cells] + [extent for _, extents in pieces for extent in extents]
    total_bytes = sum(extent.size_bytes for extent in extents)
    with ReadAhead(extents, direct_only=not allow_buffered) as read_ahead:
        taker = _Taker(read_ahead, total_bytes, progress)
        for run in cells:
            _check_bundles(store, model, run, taker)
        for tensor, tensor_extents in pieces:
            _check_tensor(model, tensor, tensor_extents, taker)
    files_bytes = sum(_check_file(store, model, file) for file in model.files)
    neurons = sum(layer.neurons for layer in model.layers)
    return Verified(name, neurons, len(model.resident), len(model.files), total_bytes + files_bytes)


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
            end = min(layer.neurons, begin + cells * layout.bundles_per_cell)
            offset_bytes = layer.offset_bytes + cell * layout.cell_bytes
            yield _Cells(index, begin, end, Extent(path, offset_bytes, cells * layout.cell_bytes))


def _pieces(tensor: weightd_pb2.Tensor, path: Path) -> Iterator[Extent]:
    for begin in range(0, tensor.size_bytes, CHUNK_BYTES):
        yield Extent(path, tensor.offset_bytes + begin, min(CHUNK_BYTES, tensor.size_bytes - begin))


def _check_bundles(store: Store, model: weightd_pb2.Model, run: _Cells, taker: _Taker) -> None:
    found = np.empty(run.end - run.begin, np.uint64)
    taker.take(run.extent, lambda cells: _native.checksum_bundles(native_shape(model.bundle), cells, found))
    expected = store.checksums(model.name, run.layer)[run.begin : run.end]
    wrong = np.flatnonzero(found != expected)
    if len(wrong):
        neuron = store.placement(model.name, run.layer)[run.begin + wrong[0]]
        raise CorruptionError(
            f"model {model.name}, layer {run.layer}, neuron {neuron}: the bundle differs from its checksum"
        )


def _check_tensor(model: weightd_pb2.Model, tensor: weightd_pb2.Tensor, extents: list[Extent], taker: _Taker) -> None:
    checksum = _native.Checksum()
    for extent in extents:
        taker.take(extent, checksum.update)
    if checksum.value != tensor.checksum:
        raise CorruptionError(
            f"model {model.name}, tensor {tensor.name}: it differs from its checksum; import it again"
        )


def _check_file(store: Store, model: weightd_pb2.Model, file: weightd_pb2.File) -> int:
    path = store.files_path(model.name) / file.name
    _check_size(model, path, file.size_bytes)
    if _native.checksum(np.frombuffer(path.read_bytes(), np.uint8)) != file.checksum:
        raise CorruptionError(f"model {model.name}, file {FILES_FOLDER}/{file.name}: it differs from its checksum")
    return int(file.size_bytes)
