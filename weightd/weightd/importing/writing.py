"""Writes the files of a model or table that is laid out: bundles.bin and, for a model, resident.safetensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightd import _native
from weightd.disk.read_ahead import CHUNK_BYTES, ReadAhead
from weightd.disk.tensors import SourceTensor
from weightd.disk.uncached_file import UncachedWriter
from weightd.disk.write_behind import WriteBehind
from weightd.errors import CheckpointError
from weightd.importing.assembly import AssemblyStep, ResidentStep
from weightd.importing.dequantise import Bytes, Elements, dequantise, first_unusable, kept_rows
from weightd.importing.plan import BundleStep, ElementRun, HoldStep
from weightd.importing.quantised.by_neuron import columns_of
from weightd.importing.slabs import SlabPart, UnusableScale, cut_rows, cut_slabs
from weightd.importing.units import Unit
from weightd.sizes import round_up
from weightd.store.layout import native_shape
from weightd.store.store import RESIDENT_FILE
from weightd_proto import weightd_pb2
from weightd_proto.encodings import (
    BLOCK_FORMATS,
    DTYPES,
    QUANTISED_DTYPES,
    bundle_neurons,
    bundles_in,
    encodings_of,
    in_blocks,
    is_plain,
    plain,
    stored_bytes,
)
from weightd_proto.files import BUNDLES_FILE
from weightd_proto.tensor_sources import gather
from weightd_proto.weightd_pb2 import Encoding, Layer, ResidentSource

Progress = Callable[[int, int], None]  # bytes read since the last call, bytes to read in all
Step = HoldStep | BundleStep | ResidentStep | AssemblyStep


class ModelWriter:
    """Runs the steps of an import, and fills in the checksums of the resident tensors.

    `resident`: the sources of record.resident, in the same order. A table has none.
    """

    def __init__(
        self,
        record: weightd_pb2.Model,
        header: bytes,
        units: Sequence[Unit],
        resident: Sequence[ResidentSource],
        folder: Path,
        allow_buffered: bool,
        progress: Progress | None,
    ) -> None:
        self._record = record
        self._header = header
        self._units = units
        self._resident = resident
        self._folder = folder
        self._allow_buffered = allow_buffered
        self._progress = progress or (lambda _read_bytes, _total_bytes: None)
        self._layout = record.bundle
        self._shape = native_shape(self._layout)
        self._held = _HeldMatrices(units, record)
        self._errors = np.zeros((len(record.layers), 2))  # sums of squared differences and of squares
        self._checksums = [np.zeros(bundles_in(self._layout, layer), np.uint64) for layer in record.layers]

    def run(self, steps: Sequence[Step]) -> list[npt.NDArray[np.uint64]]:
        """Returns the checksums of each layer's bundles. CheckpointError for a value that cannot be quantised."""
        extents = [[extent for run in step.runs for extent in run.extents] for step in steps]
        read_ahead = ReadAhead(list(chain.from_iterable(extents)), together=max(map(len, extents), default=1))
        # One cell may be larger than a chunk.
        write_behind = WriteBehind(max(CHUNK_BYTES, math.lcm(self._layout.cell_bytes, self._layout.block_bytes)))
        with ExitStack() as opened:
            bundles = opened.enter_context(self._create(BUNDLES_FILE, self._record.bundles_file_bytes))
            files, resident = [bundles], None
            if self._record.resident_file_bytes > 0:
                files.append(opened.enter_context(self._create(RESIDENT_FILE, self._record.resident_file_bytes)))
                stream = ResidentStream(files[-1], write_behind, self._header, list(self._record.resident))
                resident = _Assembly(self._resident, stream)
            with read_ahead, write_behind:
                self._run_steps(steps, read_ahead, write_behind, bundles, resident)
                if resident is not None:
                    resident.stream.finish()
                write_behind.drain()
            for file in files:
                file.finish()
        for layer, (differences, squares) in zip(self._record.layers, self._errors, strict=True):
            if squares:
                layer.quantisation_error = math.sqrt(differences / squares)
        return self._checksums

    def _create(self, name: str, size_bytes: int) -> UncachedWriter:
        return UncachedWriter(self._folder / name, size_bytes, self._allow_buffered)

    def _run_steps(
        self,
        steps: Sequence[Step],
        read_ahead: ReadAhead,
        write_behind: WriteBehind,
        bundles: UncachedWriter,
        resident: _Assembly | None,
    ) -> None:
        total_bytes = sum(extent.size_bytes for step in steps for run in step.runs for extent in run.extents)
        for step in steps:
            with ExitStack() as taken:
                stored = [taken.enter_context(read_ahead.take_all(run.extents)) for run in step.runs]
                kept = self._kept(step)
                elements = [_elements(*each) for each in zip(step.runs, stored, kept, strict=True)]
                match step:
                    case HoldStep():
                        self._held.fill(step, elements[0])
                    case BundleStep():
                        self._write(step, elements, bundles, write_behind)
                    case ResidentStep() | AssemblyStep():
                        assert resident is not None, "a table has no resident weights"
                        if step.kept:
                            _check_kept(step, elements[0])
                        resident.add(step, elements[0])
                self._progress(sum(len(data) for each in stored for data in each), total_bytes)

    def _kept(self, step: Step) -> list[bool]:
        """Which runs of a step stay as they are in the checkpoint, because slabs or matrices hold their blocks."""
        kept = [False] * len(step.runs)
        if isinstance(step, ResidentStep | AssemblyStep):
            return [step.kept]
        if isinstance(step, HoldStep):
            return [not is_plain(self._held.encoding(step.unit, step.held))]
        if isinstance(step, BundleStep):
            for part, encoding in zip(step.parts, self._encodings(step.unit), strict=True):
                if not part.columns and self._keeps_blocks:
                    kept[part.index] = not is_plain(encoding)
        return kept

    @property
    def _keeps_blocks(self) -> bool:
        """Whether bundles may hold blocks of the checkpoint, and none that the import makes."""
        format = self._layout.parts[0].encoding.format
        return bool(self._layout.slab_neurons) or self._is_table or format not in QUANTISED_DTYPES.values()

    @property
    def _is_table(self) -> bool:
        return bool(self._record.layers[0].place == Layer.TABLE)

    def _encodings(self, unit: int) -> list[Encoding]:
        return encodings_of(self._layout, self._record.layers[self._units[unit].layer])

    def _write(
        self, step: BundleStep, runs: list[Elements], bundles: UncachedWriter, write_behind: WriteBehind
    ) -> None:
        """Cuts the bundles of a step, and writes them."""
        unit, neurons = self._units[step.unit], bundle_neurons(self._layout)
        position, count = (unit.position + step.begin) // neurons, (step.end - step.begin) // neurons
        size_bytes = -(-count // self._layout.bundles_per_cell) * self._layout.cell_bytes
        buffer = write_behind.buffer()
        cells = np.frombuffer(buffer[:size_bytes], np.uint8)
        checksums = self._checksums[unit.layer][position : position + count]
        if self._layout.slab_neurons:
            self._cut_slabs(step, runs, cells, checksums)
        elif self._keeps_blocks and not is_plain(self._layout.parts[0].encoding):
            self._cut_kept(step, runs, cells, checksums)
        else:
            self._cut(step, runs, cells, checksums)
        cell = position // self._layout.bundles_per_cell
        offset_bytes = self._record.layers[unit.layer].offset_bytes + cell * self._layout.cell_bytes
        padded_bytes = round_up(size_bytes, self._layout.block_bytes)  # at the end of a layer
        buffer[size_bytes:padded_bytes] = bytes(padded_bytes - size_bytes)
        write_behind.put(bundles, buffer, padded_bytes, offset_bytes)

    def _cut_slabs(
        self, step: BundleStep, runs: list[Elements], cells: Bytes, checksums: npt.NDArray[np.uint64]
    ) -> None:
        unit = self._units[step.unit]
        parts, encodings = [], self._encodings(step.unit)
        for part, encoding in zip(step.parts, encodings, strict=True):
            matrix = self._held.matrix(step.unit, part.index) if part.columns else runs[part.index]
            data = matrix.data if matrix.dtype == encoding.format else matrix.as_dtype(encoding.format)
            parts.append(SlabPart(data, encoding, part.columns, part.first, part.step))
        try:
            cut_slabs(self._layout, parts, cells, len(checksums))
        except UnusableScale as error:
            tensor = unit.parts[error.part].matrix.tensor
            slab = (unit.position + step.begin) // self._layout.slab_neurons + error.slab
            first = slab * self._layout.slab_neurons
            module = self._record.layers[unit.layer].module
            where = f"neurons {first} to {first + self._layout.slab_neurons - 1} of {module}"
            raise _unusable_scale(tensor, encodings[error.part].format, where) from error
        _native.checksum_bundles(self._shape, cells, checksums)

    def _cut_kept(
        self, step: BundleStep, runs: list[Elements], cells: Bytes, checksums: npt.NDArray[np.uint64]
    ) -> None:
        """Of a table's rows, or of single neurons whose columns have blocks, too."""
        count, hidden = len(checksums), self._layout.hidden_size
        parts = []
        for part, encoding in zip(step.parts, self._encodings(step.unit), strict=True):
            if part.columns:
                matrix = self._held.matrix(step.unit, part.index)
                neurons = part.first + np.arange(count) * part.step
                parts.append(columns_of(matrix.data, matrix.dtype, hidden, neurons, encoding.format))
            else:
                rows = runs[part.index].data.reshape(-1, stored_bytes(encoding, hidden))
                parts.append(rows[part.first :: part.step][:count])
        try:
            cut_rows(self._layout, parts, cells, count)
        except UnusableScale as error:
            tensor = self._units[step.unit].parts[error.part].matrix.tensor
            format = self._layout.parts[error.part].encoding.format
            raise _unusable_scale(tensor, format, f"row {step.begin + error.slab}") from error
        _native.checksum_bundles(self._shape, cells, checksums)

    def _cut(self, step: BundleStep, runs: list[Elements], cells: Bytes, checksums: npt.NDArray[np.uint64]) -> None:
        unit = self._units[step.unit]
        parts = []
        for part in step.parts:
            matrix = self._held.matrix(step.unit, part.index) if part.columns else runs[part.index]
            parts.append((matrix.data, matrix.dtype, part.columns, part.first, part.step))
        try:
            self._errors[unit.layer] += _native.cut_bundles(
                shape=self._shape,
                parts=parts,
                cells=cells,
                checksums=checksums,
            )
        except _native.UnquantisableValue as error:
            index, why = error.args
            where = f"neuron {unit.position + step.begin + index} of {self._record.layers[unit.layer].module}"
            raise CheckpointError(f"{where} has a weight that is {why}: import with --dtype keep") from error


def _elements(run: ElementRun, stored: Sequence[memoryview], kept: bool) -> Elements:
    """The elements of a run; if it is kept, its blocks, with the name of their format."""
    return kept_rows(run, stored) if kept else dequantise(run, stored)


def _check_kept(step: ResidentStep | AssemblyStep, blocks: Elements) -> None:
    (run,) = step.runs
    if first_unusable(blocks.dtype, blocks.data) is not None:
        raise _unusable_scale(run.tensor, blocks.dtype, f"rows {run.first_row} to {run.end_row - 1}")


def _unusable_scale(tensor: SourceTensor, format: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{tensor.name} in {tensor.path} has a block of {format} whose scale is NaN or infinite, in {where}: download "
        "the file again"
    )


class _HeldMatrices:
    """The matrices of two neighbouring units whose columns are cut, in the encoding of the bundles.

    If these are quantised by the import: in the dtype of the checkpoint, so that they are rounded once.
    """

    def __init__(self, units: Sequence[Unit], record: weightd_pb2.Model) -> None:
        self._record = record
        self._units = units
        largest_bytes = max(sum(self._sizes_bytes(unit)) for unit in range(len(units)))
        self._memory = [np.empty(largest_bytes, np.uint8) for _ in range(min(2, len(units)))]

    def matrix(self, unit: int, number: int) -> Elements:
        """Plain elements, or blocks with the name of their format."""
        sizes_bytes = self._sizes_bytes(unit)
        begin = sum(sizes_bytes[:number])
        memory = self._memory[unit % len(self._memory)]
        return Elements(self.encoding(unit, number).format, memory[begin : begin + sizes_bytes[number]])

    def fill(self, step: HoldStep, elements: Elements) -> None:
        matrix = self.matrix(step.unit, step.held)
        encoding = self.encoding(step.unit, step.held)
        (run,) = step.runs
        begin = stored_bytes(encoding, step.first)
        elements.into(matrix.data[begin : begin + stored_bytes(encoding, run.end - run.begin)], matrix.dtype)

    def encoding(self, unit: int, number: int) -> Encoding:
        """Of a held matrix."""
        layout, matrix = self._record.bundle, self._units[unit].held[number]
        encodings = encodings_of(layout, self._record.layers[self._units[unit].layer])
        of_parts = zip(self._units[unit].parts, encodings, strict=True)
        encoding = next(each for part, each in of_parts if part.columns and part.matrix == matrix)
        if layout.slab_neurons or is_plain(encoding):
            return encoding
        made = encoding.format in QUANTISED_DTYPES.values()
        return plain(matrix.tensor.dtype) if made else in_blocks(matrix.tensor.kept_format)

    def _sizes_bytes(self, unit: int) -> list[int]:
        encodings = [self.encoding(unit, number) for number in range(len(self._units[unit].held))]
        matrices = zip(self._units[unit].held, encodings, strict=True)
        return [stored_bytes(encoding, each.rows * each.tensor.row_elements) for each, encoding in matrices]


class _Assembly:
    """Appends resident tensors to their stream, after putting those together that lie in the checkpoint in pieces."""

    def __init__(self, sources: Sequence[ResidentSource], stream: ResidentStream) -> None:
        self.stream = stream
        self._sources = sources
        self._arrays: dict[str, npt.NDArray[np.generic]] = {}

    def add(self, step: ResidentStep | AssemblyStep, elements: Elements) -> None:
        if isinstance(step, ResidentStep):
            self.stream.append(step.index, elements)
            return
        (run,) = step.runs
        if step.kept:
            self._add_kept(step, run, elements)
            return
        dtype = self.stream.dtype(step.index)
        size_bytes = DTYPES[dtype].bytes
        array = self._arrays.get(step.name)
        if array is None:
            array = self._arrays[step.name] = np.empty(run.tensor.shape, f"u{size_bytes}")
        flat = array.reshape(-1)[run.begin : run.end].view(np.uint8)
        elements.into(flat, dtype)
        if step.last:
            source = self._sources[step.index].source
            whole = np.ascontiguousarray(gather(source, self._arrays, np.stack, np.concatenate))
            self._arrays.clear()
            self.stream.append(step.index, Elements(dtype, whole.reshape(-1).view(np.uint8)))

    def _add_kept(self, step: AssemblyStep, run: ElementRun, elements: Elements) -> None:
        """Blocks of consecutive rows, which become those of columns: [rows of blocks, columns]."""
        encoding = in_blocks(elements.dtype)
        array = self._arrays.get(step.name)
        if array is None:
            rows = run.tensor.rows // encoding.block_values
            shape = (rows, run.tensor.row_elements)
            array = self._arrays[step.name] = np.empty(shape, np.dtype((np.void, encoding.block_bytes)))
        begin = stored_bytes(encoding, run.begin)
        array.reshape(-1).view(np.uint8)[begin : begin + len(elements.data)] = elements.data
        if step.last:
            blocks = np.ascontiguousarray(array.T)
            self._arrays.clear()
            self.stream.append(step.index, Elements(elements.dtype, blocks.reshape(-1).view(np.uint8)))


class ResidentStream:
    """Appends tensors to resident.safetensors in the order of `tensors`, and sets their checksums."""

    def __init__(
        self, file: UncachedWriter, write_behind: WriteBehind, header: bytes, tensors: list[weightd_pb2.Tensor]
    ) -> None:
        self._file = file
        self._write_behind = write_behind
        self._tensors = tensors
        self._checksums = [_native.Checksum() for _ in tensors]
        self._errors = np.zeros((len(tensors), 2))  # sums of squared differences and of squares
        self._rest = Elements("F32", np.empty(0, np.uint8))  # of a tensor that is quantised: less than a block
        self._buffer: memoryview | None = None
        self._filled_bytes = 0  # of the buffer
        self._offset_bytes = 0  # of the buffer in the file
        self._header = header

    def dtype(self, index: int) -> str:
        """The dtype in which append() takes what was put together: F32 for what is quantised."""
        dtype = self._tensors[index].dtype
        return dtype if dtype in DTYPES else "F32"

    def append(self, index: int, elements: Elements) -> None:
        """Appends elements to the index-th tensor. CheckpointError for a value that cannot be quantised."""
        self._write_header()
        dtype = self._tensors[index].dtype
        if dtype in BLOCK_FORMATS:
            blocks = elements.data if elements.dtype == dtype else self._quantised(index, elements)
            elements, dtype = Elements("U8", blocks), "U8"
        source_bytes, target_bytes = DTYPES[elements.dtype].bytes, DTYPES[dtype].bytes
        left = elements.data
        while len(left):
            target = self._room(len(left) // source_bytes * target_bytes)
            count = len(target) // target_bytes
            Elements(elements.dtype, left[: count * source_bytes]).into(target, dtype)
            self._checksums[index].update(target)
            left = left[count * source_bytes :]

    def _quantised(self, index: int, elements: Elements) -> Bytes:
        """The whole blocks of what is left of the tensor's elements and of those that follow."""
        tensor = self._tensors[index]
        encoding = in_blocks(tensor.dtype)
        data = np.concatenate([self._rest.data, elements.data]) if len(self._rest.data) else elements.data
        block_bytes = encoding.block_values * DTYPES[elements.dtype].bytes
        blocks = len(data) // block_bytes
        self._rest = Elements(elements.dtype, data[blocks * block_bytes :].copy())
        target = np.empty(blocks * encoding.block_bytes, np.uint8)
        try:
            error = _native.quantise(data[: blocks * block_bytes], elements.dtype, target, encoding)
        except _native.UnquantisableValue as refused:
            _, why = refused.args
            raise CheckpointError(
                f"{tensor.name} has a weight that is {why}: import with --resident-dtype plain"
            ) from refused
        self._errors[index] += error
        return target

    def _write_header(self) -> None:
        header = np.frombuffer(self._header, np.uint8)
        while len(header):
            target = self._room(len(header))
            target[:] = header[: len(target)]
            header = header[len(target) :]
        self._header = b""

    def finish(self) -> None:
        """Pads the last block."""
        for tensor, checksum, (differences, squares) in zip(self._tensors, self._checksums, self._errors, strict=True):
            tensor.checksum = checksum.value
            if squares:
                tensor.quantisation_error = math.sqrt(differences / squares)
        if self._buffer is not None:
            padded_bytes = round_up(self._filled_bytes, self._file.block_bytes)
            self._buffer[self._filled_bytes : padded_bytes] = bytes(padded_bytes - self._filled_bytes)
            self._flush(padded_bytes)

    def _room(self, wanted_bytes: int) -> Bytes:
        """Memory for the next `wanted_bytes` of the file, or for fewer, but always for whole elements."""
        if self._filled_bytes == self._write_behind.buffer_bytes:
            self._flush(self._filled_bytes)
        if self._buffer is None:
            self._buffer = self._write_behind.buffer()
        begin, self._filled_bytes = self._filled_bytes, min(self._filled_bytes + wanted_bytes, len(self._buffer))
        return np.frombuffer(self._buffer[begin : self._filled_bytes], np.uint8)

    def _flush(self, size_bytes: int) -> None:
        assert self._buffer is not None
        self._write_behind.put(self._file, self._buffer, size_bytes, self._offset_bytes)
        self._buffer = None
        self._filled_bytes = 0
        self._offset_bytes += size_bytes
