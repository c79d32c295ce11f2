"""An import: a checkpoint becomes a model of a store.

`import_checkpoint` finds the tensors, chooses the dtype, lays the model out, checks that it fits and that a client can
use its files, writes it, and publishes it. plan.py bounds the memory. Files of the store never enter the page cache,
nor do those of the checkpoint if their file system supports O_DIRECT.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightd import _native
from weightd.checkpoint.checkpoint import Checkpoint
from weightd.checkpoint.folder import CONFIG_FILE
from weightd.checkpoint.opening import open_checkpoint
from weightd.errors import CheckpointError, SpaceError
from weightd.importing.assembly import plan_resident
from weightd.importing.client_process import Ask, check_runnable, child, derive
from weightd.importing.plan import plan_bundles
from weightd.importing.quantised.kept_blocks import with_kept_formats
from weightd.importing.record import lay_out_record
from weightd.importing.sources import used_tensors, without_equal_ties
from weightd.importing.stored_dtype import (
    KEEP,
    bundle_encoding,
    kept_neurons,
    kept_slabs,
    resident_dtype,
    resident_format,
    stored_dtype,
    table_format,
)
from weightd.importing.tables import TABLES_ABOVE_BYTES, Table, choose_tables, lay_out_table
from weightd.importing.units import Unit, units_of
from weightd.importing.writing import ModelWriter, Progress, Step
from weightd.sizes import format_size
from weightd.store.device_profile import full_speed_read_bytes
from weightd.store.origin import changed_weights, origin_of, source_text
from weightd.store.staged_folder import space_errors, sync
from weightd.store.store import FILES_FOLDER, Staging, Store, model_name_for
from weightd_proto import weightd_pb2
from weightd_proto.encodings import formats_of
from weightd_proto.tables import with_tables
from weightd_proto.weightd_pb2 import ResidentSource

Tell = Callable[[str], None]
Checksums = list[npt.NDArray[np.uint64]]

# Of the catalog. LMDB copies every page that it changes, and frees the old page later.
CATALOG_BYTES = 256 << 10
CATALOG_BYTES_PER_LAYER = 2 * 2 * 4096  # a checksum and a number for each neuron, in pages of their own
CATALOG_BYTES_PER_NEURON = 2 * 12


@dataclass(frozen=True)
class LaidOut:
    """A model that is laid out but not written yet. `resident` has the sources of record.resident, in its order."""

    record: weightd_pb2.Model
    header: bytes
    units: list[Unit]
    resident: list[ResidentSource]
    steps: list[Step]
    tables: list[Table]
    notes: tuple[str, ...]  # what a user should know


def import_checkpoint(
    path: Path,
    store: Store,
    name: str | None = None,
    dtype: str = KEEP,
    allow_buffered: bool = False,
    progress: Progress | None = None,
    replaces: bytes = b"",
    ask: Ask | None = None,
    activation: str = "",
    tell: Tell | None = None,
    tables_above_bytes: int = TABLES_ABOVE_BYTES,
    layout: str = "",
    resident_request: str = "",
) -> weightd_pb2.Model:
    """Imports the checkpoint at `path` as model `name` (default: the folder's name or the file's stem).

    `dtype`: keep, fp32, bf16, fp16, int8 or int4.
    `replaces`: the import_id of the model of that name that is to be replaced.
    `ask`: the client that started the import; by default a child process is asked.
    `activation`: what the FFNs compute, whatever the configuration says; see flashclient.recipes.published.
    `tell`: is told what a user should know, for example which tensors the model does not use; and what is tried, and
    what the model takes on the disk, if somebody watches the `progress`.
    `tables_above_bytes`: embeddings that are larger, and only looked up, become tables.
    `layout`: neuron, slab, or empty: slabs where they keep what is quantised.
    `resident_request`: how matrices outside the FFNs are stored; see resident_format().

    Raises CheckpointError, SpaceError, StoreError (the name is taken), DeviceError (O_DIRECT is refused and
    `allow_buffered` is not set) or OSError. After an error the store is as before.
    """
    name = name if name is not None else model_name_for(Path(os.path.normpath(path.absolute())))
    with store.begin_import(name, replaces) as staging, space_errors(store.path):
        # First, so that a change during the import counts as a later change.
        origin = origin_of(path, dtype, activation)
        origin.tables_above_bytes, origin.layout = tables_above_bytes, layout
        origin.resident_dtype = resident_request
        with nullcontext(ask) if ask is not None else child() as asked:
            checkpoint = open_checkpoint(path)
            if tell is not None and progress is not None:
                tell(f"trying a tiny model of the type of {name}, and whether weightd can stream it")
            recipe = derive(checkpoint, asked, activation)
            block_bytes, sector_bytes = _device_sizes(staging)
            sizes = (block_bytes, full_speed_read_bytes(store), sector_bytes)
            model = lay_out(checkpoint, recipe, name, dtype, *sizes, tables_above_bytes, layout, resident_request)
            if tell is not None:
                for note in (*_notes(recipe), *model.notes):
                    tell(note)
            model.record.source = source_text(path)
            model.record.origin.CopyFrom(origin)
            files_folder = staging.folder / FILES_FOLDER
            model.record.files.extend(write_files(checkpoint, recipe, files_folder))
            needed_bytes = _check_space(model.record, store.path)
            if tell is not None and progress is not None:
                tell(f"{name} takes {format_size(needed_bytes)} in {store.path}")
            notes = check_runnable(model.record, files_folder, path, asked)
            if tell is not None and progress is not None:
                for note in notes:
                    tell(note)
        checksums = _write(model, staging.folder, allow_buffered, progress)
        _check_unchanged(path, origin)
        staging.publish(model.record, *checksums)
    return model.record


def _check_unchanged(path: Path, origin: weightd_pb2.Origin) -> None:
    """Raises CheckpointError for weights that were written while they were read: the model may be half of each."""
    if changed := changed_weights(path, origin):
        text = f"{path} changed during the import, first {changed[0]}: import it again when nobody writes to it"
        raise CheckpointError(text)


def _write(
    model: LaidOut, folder: Path, allow_buffered: bool, progress: Progress | None
) -> tuple[Checksums, Checksums]:
    """Returns the checksums of each layer's bundles, and of each table's rows."""
    steps = [*model.steps, *(step for table in model.tables for step in table.steps)]
    total_bytes = sum(extent.size_bytes for step in steps for run in step.runs for extent in run.extents)

    def advance(read_bytes: int, _: int) -> None:
        if progress is not None:
            progress(read_bytes, total_bytes)

    writer = ModelWriter(model.record, model.header, model.units, model.resident, folder, allow_buffered, advance)
    checksums, of_tables = writer.run(model.steps), []
    for table in model.tables:
        own_folder = folder / table.record.layers[0].module
        own_folder.mkdir()
        writer = ModelWriter(table.record, b"", [table.unit], [], own_folder, allow_buffered, advance)
        of_tables += writer.run(table.steps)
    return checksums, of_tables


def _notes(recipe: weightd_pb2.Recipe) -> Iterator[str]:
    yield from recipe.notes
    for left_out in recipe.left_out:
        count, first = len(left_out.tensors), left_out.tensors[0]
        yield f"{count} tensors of the checkpoint are left out, first {first}: {left_out.reason}"


def _device_sizes(staging: Staging) -> tuple[int, int]:
    """The bytes of a block and of a sector."""
    probe = staging.folder / "block_size"
    probe.touch()
    try:
        return _native.block_size_bytes(str(probe)), _native.sector_size_bytes(str(probe))
    finally:
        probe.unlink()


def lay_out(
    checkpoint: Checkpoint,
    recipe: weightd_pb2.Recipe,
    name: str,
    dtype_request: str,
    block_bytes: int,
    read_bytes: int,
    sector_bytes: int,
    tables_above_bytes: int,
    layout: str = "",
    resident_request: str = "",
) -> LaidOut:
    """What an import of the checkpoint would write. Reads vectors of the checkpoint, and tied weights.

    Args:
        dtype_request, tables_above_bytes, layout, resident_request: as import_checkpoint()'s.
        block_bytes, read_bytes, sector_bytes: of the store's device; see model_layout().
    """
    tensors, reasons = used_tensors(recipe, checkpoint.tensors), list[str]()
    if KEEP in (dtype_request, resident_request):
        tensors, reasons = with_kept_formats(tensors)
    units, resident = units_of(recipe, tensors), without_equal_ties(recipe, tensors)
    dtype = stored_dtype(recipe, tensors, dtype_request)
    dtypes = {source.name: resident_dtype(source, tensors, dtype) for source in resident}
    of_tables = {  # those that an import quantises stay resident only where they are no tables
        source.name: table_format(source, tensors, dtypes[source.name], dtype_request, resident_request)
        for source in resident
    }
    looked_up, resident = choose_tables(recipe, resident, dtypes, of_tables, dtype, tables_above_bytes)
    formats = {
        source.name: resident_format(recipe, source, tensors, dtypes[source.name], dtype_request, resident_request)
        for source in resident
    }
    kinds = {source.name: (formats[source.name], tuple(source.shape)) for source in resident}
    slabs, notes = kept_slabs(units, dtype_request, layout)
    neurons, of_neurons = kept_neurons(units, dtype_request, layout)
    encoding = slabs or neurons or bundle_encoding(recipe, dtype_request, dtype)
    sizes = (block_bytes, read_bytes, sector_bytes)
    record, header = lay_out_record(recipe.model, kinds, name, dtype, encoding, *sizes)
    record.imported_unix_s = int(time.time())
    record.import_id = os.urandom(16)
    by_name = {source.name: source for source in resident}
    in_order = [by_name[tensor.name] for tensor in record.resident]
    steps = [*plan_bundles(units, record.bundle), *plan_resident(in_order, tensors, kinds)]
    tables = [lay_out_table(record, one, of_tables[one.name], tensors, block_bytes) for one in looked_up]
    record.tables.extend(table.record for table in tables)
    return LaidOut(record, header, units, in_order, steps, tables, (*checkpoint.notes, *notes, *of_neurons, *reasons))


def _check_space(record: weightd_pb2.Model, path: Path) -> int:
    """The bytes that the model takes. SpaceError if there is no room for them. `record.files` are written already."""
    stored = with_tables(record)
    layers = [layer for one in stored for layer in one.layers]
    weights_bytes = sum(one.bundles_file_bytes for one in stored) + record.resident_file_bytes
    written_bytes = sum(file.size_bytes for file in record.files)
    catalog_bytes = CATALOG_BYTES + len(layers) * CATALOG_BYTES_PER_LAYER
    catalog_bytes += sum(layer.neurons for layer in layers) * CATALOG_BYTES_PER_NEURON
    needed_bytes = weights_bytes + catalog_bytes + written_bytes
    free_bytes = shutil.disk_usage(path).free + written_bytes
    if needed_bytes > free_bytes:
        is_fp32 = formats_of(record) == record.compute_dtype == "F32"
        narrower = is_fp32 and needed_bytes - weights_bytes // 2 <= free_bytes
        raise SpaceError(
            f"{record.name} needs {format_size(needed_bytes)} in {path}, but {format_size(free_bytes)} are free: "
            f"make room{', or import with --dtype bf16' if narrower else ''}"
        )
    return needed_bytes


def write_files(checkpoint: Checkpoint, recipe: weightd_pb2.Recipe, folder: Path) -> list[weightd_pb2.File]:
    """Writes config and tokenizer into `folder`, which must not exist."""
    folder.mkdir()
    checkpoint.write_files(folder)
    if json.loads(recipe.config_json) != checkpoint.config:  # that of another class, which runs the checkpoint
        (folder / CONFIG_FILE).write_bytes(recipe.config_json)
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(path)
        data = np.frombuffer(path.read_bytes(), np.uint8)
        name = str(path.relative_to(folder))
        files.append(weightd_pb2.File(name=name, size_bytes=len(data), checksum=_native.checksum(data)))
    return files
