"""An import: a checkpoint becomes a model of a store.

`import_checkpoint` finds the tensors, chooses the dtype, lays the model out, checks that it fits and that a client can
use its files, writes it, and publishes it. plan.py bounds the memory. Files of the store never enter the page cache,
nor do those of the checkpoint if their file system supports O_DIRECT.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightd import _native
from weightd.checkpoint.checkpoint import Checkpoint
from weightd.checkpoint.opening import open_checkpoint
from weightd.disk.read_ahead import CHUNK_BYTES, ReadAhead
from weightd.disk.uncached_file import UncachedWriter
from weightd.disk.write_behind import WriteBehind
from weightd.errors import SpaceError
from weightd.importing.dequantise import Bytes, Elements, dequantise
from weightd.importing.families import Recipe, TensorSource, recipe_of
from weightd.importing.plan import BundleStep, DownStep, ResidentStep, Step, plan_bundles, plan_resident
from weightd.importing.rehearsal import Rehearse, check_runnable
from weightd.importing.resident import lay_out_resident
from weightd.importing.sources import sources_of
from weightd.importing.stored_dtype import KEEP, stored_dtype
from weightd.sizes import format_size, round_up
from weightd.store.layout import bundle_layout, lay_out_layers, native_shape
from weightd.store.origin import origin_of, source_text
from weightd.store.staged_folder import space_errors, sync
from weightd.store.store import FILES_FOLDER, RESIDENT_FILE, Staging, Store, model_name_for
from weightd_proto import weightd_pb2
from weightd_proto.encodings import DTYPES, part_bytes, parts_of, plain
from weightd_proto.files import BUNDLES_FILE

Progress = Callable[[int, int], None]  # bytes read since the last call, bytes to read in all

# Twice the 12 bytes of a neuron: LMDB copies every page that it changes, and frees the old page later.
CATALOG_BYTES_PER_NEURON = 2 * 12
# Config and tokenizer (33 MB for Gemma's vocabulary of 262144), and pages of LMDB.
FILES_BYTES = 64 << 20


@dataclass(frozen=True)
class _Model:
    """A model that is laid out but not written yet."""

    recipe: Recipe
    sources: dict[str, TensorSource]
    record: weightd_pb2.Model
    resident_header: bytes

    @property
    def steps(self) -> list[Step]:
        bundles = plan_bundles(self.recipe, self.sources, self.record.bundle)
        return [*bundles, *plan_resident(list(self.record.resident), self.sources)]


def import_checkpoint(
    path: Path,
    store: Store,
    name: str | None = None,
    dtype: str = KEEP,
    allow_buffered: bool = False,
    progress: Progress | None = None,
    replaces: bytes = b"",
    rehearse: Rehearse | None = None,
) -> weightd_pb2.Model:
    """Imports the checkpoint at `path` as model `name` (default: the folder's name or the file's stem).

    `dtype`: keep, fp32, bf16 or fp16. `replaces`: the import_id of the model of that name that is to be replaced.
    `rehearse`: see check_runnable. Raises CheckpointError, SpaceError, StoreError (the name is taken), DeviceError
    (O_DIRECT is refused and `allow_buffered` is not set) or OSError. After an error the store is as before.
    """
    name = name if name is not None else model_name_for(Path(os.path.normpath(path.absolute())))
    with store.begin_import(name, replaces) as staging, space_errors(store.path):
        origin = origin_of(path, dtype)  # first, so that a change during the import counts as a later change
        checkpoint = open_checkpoint(path)
        model = _lay_out(checkpoint, name, dtype, _block_bytes(staging))
        model.record.source = source_text(path)
        model.record.origin.CopyFrom(origin)
        _check_space(model.record, store.path)
        files_folder = staging.folder / FILES_FOLDER
        model.record.files.extend(_write_files(checkpoint, files_folder))
        check_runnable(model.record, files_folder, path, rehearse)
        checksums = _Writing(model, staging.folder, allow_buffered, progress).run()
        staging.publish(model.record, checksums)
    return model.record


def _block_bytes(staging: Staging) -> int:
    probe = staging.folder / "block_size"
    probe.touch()
    try:
        return _native.block_size_bytes(str(probe))
    finally:
        probe.unlink()


def _lay_out(checkpoint: Checkpoint, name: str, dtype_request: str, block_bytes: int) -> _Model:
    recipe, sources = sources_of(recipe_of(checkpoint.config), checkpoint)
    dtype = stored_dtype(sources, dtype_request)
    layout = bundle_layout(parts_of(recipe.parts, plain(dtype)), recipe.hidden_size, block_bytes)
    layers, bundles_file_bytes = lay_out_layers(layout, [(ffn.module, ffn.neurons) for ffn in recipe.layers])
    header, tensors = lay_out_resident(recipe.resident, dtype, block_bytes)
    record = weightd_pb2.Model(
        name=name,
        family=recipe.family,
        compute_dtype=dtype,
        bundle=layout,
        layers=layers,
        bundles_file_bytes=bundles_file_bytes,
        resident=tensors,
        resident_file_bytes=tensors[-1].offset_bytes + tensors[-1].size_bytes,
        imported_unix_s=int(time.time()),
        import_id=os.urandom(16),
    )
    return _Model(recipe, sources, record, header)


def _check_space(record: weightd_pb2.Model, path: Path) -> None:
    catalog_bytes = sum(layer.neurons for layer in record.layers) * CATALOG_BYTES_PER_NEURON
    needed_bytes = record.bundles_file_bytes + record.resident_file_bytes + catalog_bytes + FILES_BYTES
    free_bytes = shutil.disk_usage(path).free
    if needed_bytes > free_bytes:
        narrower = ", or import with --dtype bf16" if record.compute_dtype == "F32" else ""
        raise SpaceError(
            f"{record.name} needs {format_size(needed_bytes)} in {path}, but {format_size(free_bytes)} are free: "
            f"make room{narrower}"
        )


def _write_files(checkpoint: Checkpoint, folder: Path) -> list[weightd_pb2.File]:
    folder.mkdir()
    checkpoint.write_files(folder)
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(path)
        data = np.frombuffer(path.read_bytes(), np.uint8)
        name = str(path.relative_to(folder))
        files.append(weightd_pb2.File(name=name, size_bytes=len(data), checksum=_native.checksum(data)))
    return files


class _Writing:
    """Writes bundles.bin and resident.safetensors, and fills in the checksums of the resident tensors."""

    def __init__(self, model: _Model, folder: Path, allow_buffered: bool, progress: Progress | None) -> None:
        self._record = model.record
        self._header = model.resident_header
        self._layout = model.record.bundle
        self._shape = native_shape(self._layout)
        self._steps = model.steps
        self._folder = folder
        self._allow_buffered = allow_buffered
        self._progress = progress or (lambda _read_bytes, _total_bytes: None)
        self._down_dtype = self._layout.parts[-1].encoding.format
        self._column_bytes = part_bytes(self._layout)[-1]
        down_bytes = max(layer.neurons for layer in self._record.layers) * self._column_bytes
        self._downs = [np.empty(down_bytes, np.uint8) for _ in range(min(2, len(self._record.layers)))]
        self._checksums = [np.zeros(layer.neurons, np.uint64) for layer in self._record.layers]

    def run(self) -> list[npt.NDArray[np.uint64]]:
        """Returns the checksums of each layer's bundles."""
        read_ahead = ReadAhead([piece.extent for step in self._steps for piece in step.slices])
        # One cell may be larger than a chunk.
        write_behind = WriteBehind(max(CHUNK_BYTES, self._layout.cell_bytes))
        with self._create(BUNDLES_FILE, self._record.bundles_file_bytes) as bundles:
            with self._create(RESIDENT_FILE, self._record.resident_file_bytes) as resident:
                with read_ahead, write_behind:
                    self._run_steps(read_ahead, write_behind, bundles, resident)
                resident.finish()
            bundles.finish()
        return self._checksums

    def _create(self, name: str, size_bytes: int) -> UncachedWriter:
        return UncachedWriter(self._folder / name, size_bytes, self._allow_buffered)

    def _run_steps(
        self, read_ahead: ReadAhead, write_behind: WriteBehind, bundles: UncachedWriter, resident: UncachedWriter
    ) -> None:
        stream = _ResidentStream(resident, write_behind, self._header, list(self._record.resident))
        total_bytes = sum(piece.extent.size_bytes for step in self._steps for piece in step.slices)
        for step in self._steps:
            with ExitStack() as taken:
                stored = [taken.enter_context(read_ahead.take(piece.extent)) for piece in step.slices]
                elements = [dequantise(piece.source, data) for piece, data in zip(step.slices, stored, strict=True)]
                match step:
                    case DownStep():
                        self._hold(step, elements[0])
                    case BundleStep():
                        self._cut(step, elements, bundles, write_behind)
                    case ResidentStep():
                        stream.append(step.index, elements[0])
                self._progress(sum(len(data) for data in stored), total_bytes)
        stream.finish()
        write_behind.drain()

    def _down(self, layer: int) -> Bytes:
        """The down matrix of a layer, which is in memory."""
        return self._downs[layer % 2][: self._record.layers[layer].neurons * self._column_bytes]

    def _hold(self, step: DownStep, elements: Elements) -> None:
        begin, end = (count * DTYPES[self._down_dtype].bytes for count in step.slices[0].elements)
        elements.into(self._down(step.layer)[begin:end], self._down_dtype)

    def _cut(self, step: BundleStep, rows: list[Elements], bundles: UncachedWriter, write_behind: WriteBehind) -> None:
        cells = -(-(step.end - step.begin) // self._layout.bundles_per_cell)
        size_bytes = cells * self._layout.cell_bytes
        buffer = write_behind.buffer()
        _native.cut_bundles(
            shape=self._shape,
            rows=[part.data for part in rows],
            row_dtypes=[part.dtype for part in rows],
            down=self._down(step.layer),
            first=step.begin,
            cells=np.frombuffer(buffer[:size_bytes], np.uint8),
            checksums=self._checksums[step.layer][step.begin : step.end],
        )
        cell = step.begin // self._layout.bundles_per_cell
        offset_bytes = self._record.layers[step.layer].offset_bytes + cell * self._layout.cell_bytes
        write_behind.put(bundles, buffer, size_bytes, offset_bytes)


class _ResidentStream:
    """Appends tensors to resident.safetensors in the order of `tensors`, and sets their checksums."""

    def __init__(
        self, file: UncachedWriter, write_behind: WriteBehind, header: bytes, tensors: list[weightd_pb2.Tensor]
    ) -> None:
        self._file = file
        self._write_behind = write_behind
        self._tensors = tensors
        self._checksums = [_native.Checksum() for _ in tensors]
        self._buffer: memoryview | None = None
        self._filled_bytes = 0  # of the buffer
        self._offset_bytes = 0  # of the buffer in the file
        self._header = header

    def append(self, index: int, elements: Elements) -> None:
        """Appends elements to the index-th tensor."""
        self._write_header()
        dtype = self._tensors[index].dtype
        source_bytes, target_bytes = DTYPES[elements.dtype].bytes, DTYPES[dtype].bytes
        left = elements.data
        while len(left):
            target = self._room(len(left) // source_bytes * target_bytes)
            count = len(target) // target_bytes
            Elements(elements.dtype, left[: count * source_bytes]).into(target, dtype)
            self._checksums[index].update(target)
            left = left[count * source_bytes :]

    def _write_header(self) -> None:
        header = np.frombuffer(self._header, np.uint8)
        while len(header):
            target = self._room(len(header))
            target[:] = header[: len(target)]
            header = header[len(target) :]
        self._header = b""

    def finish(self) -> None:
        """Pads the last block."""
        for tensor, checksum in zip(self._tensors, self._checksums, strict=True):
            tensor.checksum = checksum.value
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
