"""The record of a model that is to be imported: where everything will lie in the store, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping

from weightd.importing.resident import Shape, lay_out_resident
from weightd.importing.slabs import Slabs
from weightd.store.layout import lay_out_layers, model_layout
from weightd_proto.encodings import parts_of
from weightd_proto.weightd_pb2 import BundlePart, Encoding, Model


def lay_out_record(
    recipe: Model,
    kinds: Mapping[str, tuple[str, Shape]],
    name: str,
    dtype: str,
    encoding: Encoding | Slabs,
    block_bytes: int,
    read_bytes: int,
    sector_bytes: int,
) -> tuple[Model, bytes]:
    """The record, without checksums, and the header of resident.safetensors.

    Args:
        recipe: the `model` of a recipe.
        kinds: dtypes and shapes of the resident tensors.
        dtype: in which the model is computed.
        encoding: of the bundles, or those of slabs.
        block_bytes, read_bytes, sector_bytes: of the store's device; see model_layout().
    """
    record = Model()
    record.CopyFrom(recipe)
    record.name = name
    record.compute_dtype = dtype
    names, slab_neurons = [part.name for part in recipe.bundle.parts], 0
    if isinstance(encoding, Slabs):
        slab_neurons, first = encoding.neurons, encoding.layers[0]
        parts = [BundlePart(name=name, encoding=each) for name, each in zip(names, first, strict=True)]
        for layer, encodings in zip(record.layers, encoding.layers, strict=True):
            layer.encodings.extend(() if encodings == first else encodings)
    else:
        parts = parts_of(names, encoding)
    sizes = (block_bytes, read_bytes, sector_bytes, slab_neurons)
    layout = model_layout(parts, recipe.bundle.hidden_size, record.layers, *sizes)
    record.bundle.CopyFrom(layout)
    record.bundles_file_bytes = lay_out_layers(record.bundle, record.layers)
    header, stored = lay_out_resident(kinds, block_bytes)
    record.resident.extend(stored)
    record.resident_file_bytes = stored[-1].offset_bytes + stored[-1].size_bytes
    return record, header
