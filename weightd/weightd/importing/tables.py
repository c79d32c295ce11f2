"""The tables of an import: embeddings whose rows are not resident, but read when they are looked up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from weightd.disk.tensors import SourceTensor
from weightd.importing.plan import BundleStep, HoldStep, plan_bundles
from weightd.importing.units import TensorMatrix, Unit, UnitPart
from weightd.store.layout import bundle_layout, lay_out_layers
from weightd.store.store import check_model_name
from weightd_proto.encodings import COMPUTE_DTYPES, encoding_named, parts_of, stored_bytes
from weightd_proto.tables import ROW, WEIGHT, table_name
from weightd_proto.weightd_pb2 import Layer, Model, Recipe, ResidentSource

# Unless --tables-above says otherwise. The pool of a table may take a segment of up to 64 MiB, for which --dram must
# have room, so a smaller table might save no memory.
TABLES_ABOVE_BYTES = 64 << 20

Tensors = Mapping[str, SourceTensor]


@dataclass(frozen=True)
class Table:
    """A table that is laid out but not written yet."""

    record: Model
    unit: Unit
    steps: list[HoldStep | BundleStep]


def choose_tables(
    recipe: Recipe,
    resident: Sequence[ResidentSource],
    dtypes: Mapping[str, str],
    formats: Mapping[str, str],
    dtype: str,
    above_bytes: int,
) -> tuple[list[ResidentSource], list[ResidentSource]]:
    """Those of `resident` that become tables, and the others.

    A table is a tensor of the checkpoint as it is, larger than `above_bytes` as it is stored. No other tensor is tied
    to it, because a head is needed as a whole.

    Args:
        dtypes: in which `resident` are stored where they are plain.
        formats: in which tables are stored: these, or formats of blocks that are kept.
    """
    names = {f"{module}.{WEIGHT}" for module in recipe.tables} - {source.tied_to for source in recipe.resident}

    def is_table(source: ResidentSource) -> bool:
        if source.name not in names or source.tied_to or source.source.WhichOneof("of") != "tensor":
            return False
        if dtypes[source.name] != dtype or dtype not in COMPUTE_DTYPES.values() or len(source.shape) != 2:
            return False
        return stored_bytes(encoding_named(formats[source.name]), prod(source.shape)) > above_bytes

    chosen = [source for source in resident if is_table(source)]
    return chosen, [source for source in resident if source not in chosen]


def lay_out_table(model: Model, source: ResidentSource, format: str, tensors: Tensors, block_bytes: int) -> Table:
    """`model`: the record that the table becomes a part of. `format`: a dtype, or that of blocks which are kept."""
    record = table_record(model, source, format, block_bytes)
    rows = record.layers[0].neurons
    part = UnitPart(TensorMatrix(tensors[source.source.tensor], 0, rows), columns=False, first=0, step=1)
    unit = Unit(layer=0, position=0, neurons=rows, parts=(part,))
    return Table(record, unit, list(plan_bundles([unit], record.bundle)))


def table_record(model: Model, source: ResidentSource, format: str, block_bytes: int) -> Model:
    """As lay_out_table()."""
    rows, width = source.shape
    module = check_model_name(source.name.removesuffix(f".{WEIGHT}"))  # of a folder, too
    record = Model(
        name=table_name(model.name, module),
        family=model.family,
        compute_dtype=model.compute_dtype,
        bundle=bundle_layout(parts_of((ROW,), encoding_named(format)), width, block_bytes),
        layers=[Layer(module=module, neurons=rows, place=Layer.TABLE, weights=[WEIGHT])],
        import_id=model.import_id,
    )
    record.bundles_file_bytes = lay_out_layers(record.bundle, record.layers)
    return record
