"""The in-band data path: the bytes that a Fetch asks for, in answers of at most DATA_BYTES_MAX.

All functions block. One step holds at most FETCH_BYTES_MAX of cells and one answer. Between steps a stream holds its
request and the last answer, whatever the size of what is fetched.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from weightd import _native
from weightd._native import EngineThread
from weightd.errors import CorruptionError, LimitError, RequestError
from weightd.serving.served_models import ServedModel, ServedModels
from weightd.store.calibration import calibration_path
from weightd.store.checked_file import model_file, pieces
from weightd.store.store import Store
from weightd_proto import weightd_pb2
from weightd_proto.encodings import bundles_in

RESPONSE_BYTES_MAX = 1 << 20
# One block less leaves room for the message's own bytes and keeps ranges aligned to blocks.
DATA_BYTES_MAX = RESPONSE_BYTES_MAX - 4096
REQUEST_BYTES_MAX = RESPONSE_BYTES_MAX + (64 << 10)  # a piece of a calibration, or FETCH_NAMED_MAX numbers
FETCH_BYTES_MAX = 2 << 20  # of cells, or one cell; small bundles may be scattered over many cells
FETCH_BUNDLES_MAX = 1 << 20  # of one call, ranges included
FETCH_NAMED_MAX = 1 << 17  # neurons named in one call: 1 MiB while the stream is open, in the request and as positions
FETCH_RANGES_MAX = 1 << 14  # of one call

Indices = npt.NDArray[np.uint32]


class Positions:
    """Positions that were named one by one, then ranges of positions, which are expanded on demand."""

    def __init__(self, named: Indices, ranges: npt.NDArray[np.int64]) -> None:
        """`ranges`: [ranges, 2], begin and end."""
        self._named = named
        self._begins = ranges[:, 0]
        self._ends = len(named) + np.cumsum(ranges[:, 1] - ranges[:, 0])  # for each range, the index behind it

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else len(self._named)

    def part(self, first: int, last: int) -> Indices:
        """The positions with index [first, last)."""
        index = np.arange(max(first, len(self._named)), min(last, len(self)))
        which = np.searchsorted(self._ends, index, side="right")
        starts = np.concatenate([[len(self._named)], self._ends])[which]
        ranged = (self._begins[which] + index - starts).astype(np.uint32)
        return np.concatenate([self._named[first:last], ranged])


class Fetcher:
    """Answers Fetch calls from the engine and the store."""

    def __init__(self, store: Store, models: ServedModels, engine: EngineThread) -> None:
        self._store = store
        self._models = models
        self._engine = engine

    def answers(self, served: ServedModel, request: weightd_pb2.FetchRequest) -> Iterator[bytes]:
        """The data of each response, in order. Raises RequestError at once if something requested does not exist.

        Iterating raises CorruptionError, OSError (a read failed), MemoryError (no share of the pool is left).
        """
        match request.WhichOneof("what"):
            case "bundles":
                return self._bundles(served, request.bundles.layer, self._positions(served, request.bundles))
            case "resident":
                return self._resident(served, request.resident.offset, request.resident.size)
            case "file":
                return self._file(served, request.file)
            case "placement_of":
                return self._placement(served, request.placement_of)
            case "calibration":
                return self._calibration(served, request.calibration)
            case _:
                raise RequestError("a Fetch names bundles, resident, file or placement_of; this one names none of them")

    def _positions(self, served: ServedModel, wanted: weightd_pb2.NeuronSet) -> Positions:
        """All requested positions, in order. Raises RequestError, LimitError."""
        bundles = bundles_in(served.record.bundle, _layer(served, wanted.layer))
        if len(wanted.neurons) > FETCH_NAMED_MAX or len(wanted.positions) > FETCH_RANGES_MAX:
            raise LimitError(
                f"{len(wanted.neurons)} neurons and {len(wanted.positions)} ranges in one call, at most "
                f"{FETCH_NAMED_MAX} and {FETCH_RANGES_MAX}: ask in several calls"
            )
        count = len(wanted.neurons) + sum(max(0, part.end - part.begin) for part in wanted.positions)
        if count > FETCH_BUNDLES_MAX:
            raise LimitError(f"{count} bundles in one call, at most {FETCH_BUNDLES_MAX}: ask in several calls")
        for part in wanted.positions:
            if not part.begin <= part.end <= bundles:
                raise RequestError(f"no positions {part.begin} to {part.end} in a layer of {bundles} bundles")
        neurons = np.array(wanted.neurons, dtype=np.uint32)
        if len(neurons) and neurons.max() >= bundles:
            raise RequestError(f"no neuron {neurons.max()} in a layer of {bundles} bundles")
        named = self._models.positions(served.record.name, wanted.layer)[neurons] if len(neurons) else neurons
        ranges = np.array([(part.begin, part.end) for part in wanted.positions], dtype=np.int64)
        return Positions(named, ranges.reshape(-1, 2))

    def _bundles(self, served: ServedModel, layer: int, positions: Positions) -> Iterator[bytes]:
        layout = served.record.bundle
        cells_max = max(1, FETCH_BYTES_MAX // layout.cell_bytes)
        bundles_max = max(1, min(DATA_BYTES_MAX // layout.bundle_bytes, max(cells_max, layout.bundles_per_cell)))
        first = 0
        while first < len(positions):
            part = positions.part(first, first + bundles_max)
            part = part[: _first_in_cells(part // np.uint32(layout.bundles_per_cell), cells_max)]
            first += len(part)
            yield from _cut(self._read(served, layer, part))

    def _read(self, served: ServedModel, layer: int, positions: Indices) -> bytes:
        """The bundles at `positions`, concatenated."""
        layout = served.record.bundle
        cells, which = np.unique(positions // np.uint32(layout.bundles_per_cell), return_inverse=True)
        try:
            data = self._engine.fetch(served.number, layer, cells, layout.cell_bytes)
        except _native.CorruptBundle as error:
            position = error.position
            if error.error:  # a whole cell could not be read: name a requested bundle in it
                cell = positions // np.uint32(layout.bundles_per_cell) == position // layout.bundles_per_cell
                position = int(positions[cell][0])
            raise self._store.corrupt_bundle(served.record.name, error.layer, position, error.error) from error
        per_cell, stride_bytes = layout.bundles_per_cell, layout.stride_bytes
        if per_cell == 1:
            by_cell = np.frombuffer(data, np.uint8).reshape(len(cells), layout.cell_bytes)
            return by_cell[which, : layout.bundle_bytes].tobytes()
        used = np.frombuffer(data, np.uint8).reshape(len(cells), layout.cell_bytes)[:, : per_cell * stride_bytes]
        bundles = used.reshape(len(cells), per_cell, stride_bytes)
        return bundles[which, positions % np.uint32(per_cell), : layout.bundle_bytes].tobytes()

    def _resident(self, served: ServedModel, offset: int, size: int) -> Iterator[bytes]:
        whole = served.record.resident_file_bytes
        if offset + size > whole:
            raise RequestError(f"no bytes {offset} to {offset + size} in resident weights of {whole} bytes")
        return self._resident_parts(served, offset, size)

    def _resident_parts(self, served: ServedModel, offset: int, size: int) -> Iterator[bytes]:
        for first in range(offset, offset + size, DATA_BYTES_MAX):
            part = min(DATA_BYTES_MAX, offset + size - first)
            try:
                yield self._engine.fetch_resident(served.number, first, part)
            except _native.CorruptResident as error:
                raise CorruptionError(str(error)) from error

    def _file(self, served: ServedModel, name: str) -> Iterator[bytes]:
        # Only names in the catalog reach the file system.
        file = next((file for file in served.record.files if file.name == name), None)
        if file is None:
            names = ", ".join(file.name for file in served.record.files)
            raise RequestError(f"model {served.record.name!r} has no file {name!r}: there is {names}")
        return map(bytes, model_file(self._store, served.record, file, DATA_BYTES_MAX))

    def _calibration(self, served: ServedModel, wanted: weightd_pb2.CalibrationFile) -> Iterator[bytes]:
        name, newest = served.record.name, served.record.calibration
        if not newest.version:
            raise RequestError(f"model {name!r} was never calibrated: run `flashclient calibrate {name}`")
        if wanted.version not in (0, newest.version):
            raise RequestError(f"no version {wanted.version} of {name!r}'s calibration: there is {newest.version}")
        file = next((file for file in newest.files if file.name == wanted.name), None)
        if file is None:
            names = ", ".join(file.name for file in newest.files)
            raise RequestError(f"the calibration of {name!r} has no file {wanted.name!r}: there is {names}")
        begin, end = wanted.range.offset, wanted.range.offset + wanted.range.size
        if not wanted.HasField("range"):
            begin, end = 0, file.size_bytes
        if end > file.size_bytes:
            raise RequestError(f"no bytes {begin} to {end} in {file.name} of {file.size_bytes} bytes")
        return self._calibration_parts(served, file, begin, end)

    def _calibration_parts(self, served: ServedModel, file: weightd_pb2.File, begin: int, end: int) -> Iterator[bytes]:
        """Reads the whole file, because its checksum covers all of it. Raises an error at the end if it differs."""
        record = served.record
        path = calibration_path(self._store, record.name, record.calibration.version) / file.name
        what = f"model {record.name}, calibration file {file.name}"
        first = 0
        for data in pieces(path, file, what, "calibrate it again", DATA_BYTES_MAX):
            part = bytes(data[max(0, begin - first) : max(0, end - first)])
            first += len(data)
            if part:
                yield part

    def _placement(self, served: ServedModel, layer: int) -> Iterator[bytes]:
        bundles = bundles_in(served.record.bundle, _layer(served, layer))
        return self._placement_parts(served, layer, bundles)

    def _placement_parts(self, served: ServedModel, layer: int, bundles: int) -> Iterator[bytes]:
        for first in range(0, bundles, DATA_BYTES_MAX // 4):
            placement = self._store.placement(served.record.name, layer)
            yield placement[first : first + DATA_BYTES_MAX // 4].astype("<u4", copy=False).tobytes()


def _layer(served: ServedModel, layer: int) -> weightd_pb2.Layer:
    layers = served.record.layers
    if layer >= len(layers):
        raise RequestError(f"no layer {layer} in model {served.record.name!r} of {len(layers)} layers")
    return layers[layer]


def _first_in_cells(cells: Indices, cells_max: int) -> int:
    """How many of the first entries lie in `cells_max` different cells."""
    _, first_uses = np.unique(cells, return_index=True)
    return int(np.sort(first_uses)[cells_max]) if len(first_uses) > cells_max else len(cells)


def _cut(data: bytes) -> Iterator[bytes]:
    """`data` in parts of at most DATA_BYTES_MAX."""
    for first in range(0, len(data), DATA_BYTES_MAX):
        yield data[first : first + DATA_BYTES_MAX]
