"""Dtypes and encodings: how numbers are stored. Daemon and client take every name and size from here (C++: encoding.h).

A dtype is a kind of number. A model computes in one of them, and says which (Model.compute_dtype). An encoding is how
one part of a bundle stores its numbers (weightd.v1.Encoding): as they are, or in blocks with scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from weightd_proto.tables import table_name
from weightd_proto.weightd_pb2 import BundleLayout, BundlePart, Encoding, Layer, Model, Tensor


class Dtype(NamedTuple):
    """A kind of number."""

    name: str  # as safetensors spells it
    bytes: int
    numpy: str  # little endian; floats of 16 and 8 bits as unsigned integers of their bits
    torch: str  # as an attribute of torch


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("F64", 8, "<f8", "float64"),
        Dtype("F32", 4, "<f4", "float32"),
        Dtype("BF16", 2, "<u2", "bfloat16"),
        Dtype("F16", 2, "<u2", "float16"),
        Dtype("F8_E4M3", 1, "|u1", "float8_e4m3fn"),
        Dtype("F8_E5M2", 1, "|u1", "float8_e5m2"),
        Dtype("F8_E8M0", 1, "|u1", "float8_e8m0fnu"),
        Dtype("I64", 8, "<i8", "int64"),
        Dtype("I32", 4, "<i4", "int32"),
        Dtype("I16", 2, "<i2", "int16"),
        Dtype("I8", 1, "|i1", "int8"),
        Dtype("U64", 8, "<u8", "uint64"),
        Dtype("U32", 4, "<u4", "uint32"),
        Dtype("U16", 2, "<u2", "uint16"),
        Dtype("U8", 1, "|u1", "uint8"),
        Dtype("BOOL", 1, "|b1", "bool"),
    )
}
# In which models are computed. By what `weightd import --dtype` calls them.
COMPUTE_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


class BlockLayout(NamedTuple):
    """A quantised format, whose blocks hold their own scales."""

    values: int  # of a block
    bytes: int
    scale_offsets: tuple[int, ...]  # in a block, in bytes: of the scales and minima that are no integers
    scale_dtype: str = "F16"


# Those that kernels compute with: GGML's, FP8 (F8_E4M3) and NVFP4 (E2M1, with scales of F8_E4M3 for 16 and one of F32).
BLOCK_FORMATS = {
    "Q8_0": BlockLayout(32, 34, (0,)),
    "Q4_0": BlockLayout(32, 18, (0,)),
    "Q4_1": BlockLayout(32, 20, (0, 2)),
    "IQ4_NL": BlockLayout(32, 18, (0,)),
    "Q5_0": BlockLayout(32, 22, (0,)),
    "Q5_1": BlockLayout(32, 24, (0, 2)),
    "MXFP4": BlockLayout(32, 17, (0,), "F8_E8M0"),
    "Q2_K": BlockLayout(256, 84, (80, 82)),
    "Q3_K": BlockLayout(256, 110, (108,)),
    "Q4_K": BlockLayout(256, 144, (0, 2)),
    "Q5_K": BlockLayout(256, 176, (0, 2)),
    "Q6_K": BlockLayout(256, 210, (208,)),
    "IQ4_XS": BlockLayout(256, 136, (0,)),
    "FP8_128": BlockLayout(128, 132, (0,), "F32"),
    "FP8_32": BlockLayout(32, 36, (0,), "F32"),
    "NVFP4_256": BlockLayout(256, 148, (0,), "F32"),
    "NVFP4_32": BlockLayout(32, 22, (0,), "F32"),
}
E4M3_MAX = 448  # the greatest number of F8_E4M3
# What `weightd import --dtype` quantises bundles to. Of 4 bits IQ4_NL has the smallest error: see README.md.
QUANTISED_DTYPES = {"int8": "Q8_0", "int4": "IQ4_NL"}
# What `weightd import --layout` makes of bundles: one neuron each, or a slab of neurons (BundleLayout.slab_neurons).
LAYOUTS = ("neuron", "slab")
# Neurons of a slab. Fewer would make rows of down too short for vectors; the most are those of the largest block.
SLAB_NEURONS_MIN, SLAB_NEURONS_MAX = 32, 256
assert all(SLAB_NEURONS_MIN <= format.values <= SLAB_NEURONS_MAX for format in BLOCK_FORMATS.values())
# How `weightd import --resident-dtype` stores matrices outside the FFNs: in the model's dtype, in the blocks of the
# checkpoint, or quantised as bundles are.
RESIDENT_DTYPES = ("plain", "keep", *QUANTISED_DTYPES)
# Two numbers of 4 bits in a byte, the lower half first, as in published checkpoints. Their scales lie elsewhere.
PACKED_E2M1 = Encoding(format="E2M1", block_values=2, block_bytes=1)
# bitsandbytes': quantiles of the normal distribution, by code; the upper half of a byte first.
PACKED_NF4 = Encoding(format="NF4", block_values=2, block_bytes=1)
NF4_NUMBERS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def plain(dtype: str) -> Encoding:
    """The encoding of numbers that are stored one by one. KeyError for an unknown dtype."""
    return Encoding(format=dtype, block_values=1, block_bytes=DTYPES[dtype].bytes)


def in_blocks(format: str) -> Encoding:
    """The encoding of one of BLOCK_FORMATS. KeyError for an unknown one."""
    block = BLOCK_FORMATS[format]
    return Encoding(format=format, block_values=block.values, block_bytes=block.bytes, scales=Encoding.IN_BLOCK)


def encoding_named(name: str) -> Encoding:
    """The encoding of a resident tensor, by its dtype or format. KeyError for an unknown one."""
    return in_blocks(name) if name in BLOCK_FORMATS else plain(name)


def is_plain(encoding: Encoding) -> bool:
    return encoding.format in DTYPES and encoding == plain(encoding.format)


def stored_bytes(encoding: Encoding, values: int) -> int:
    """The bytes of `values` numbers, which must be whole blocks, as check() makes sure of for a model."""
    assert values % encoding.block_values == 0
    return values // encoding.block_values * encoding.block_bytes


def parts_of(names: Sequence[str], encoding: Encoding) -> list[BundlePart]:
    """The parts of a bundle, all stored alike."""
    return [BundlePart(name=name, encoding=encoding) for name in names]


def bundle_neurons(layout: BundleLayout) -> int:
    """The neurons of a bundle: 1, or those of a slab."""
    return max(1, layout.slab_neurons)


def layout_of(layout: BundleLayout) -> str:
    """One of LAYOUTS."""
    return LAYOUTS[bundle_neurons(layout) > 1]


def bundles_in(layout: BundleLayout, layer: Layer) -> int:
    """The bundles of a layer. They are what placement, checksums and positions count."""
    return layer.neurons // bundle_neurons(layout)


def encodings_of(layout: BundleLayout, layer: Layer) -> list[Encoding]:
    """The encodings of a layer's parts, in their order."""
    return list(layer.encodings) or [part.encoding for part in layout.parts]


def part_bytes(layout: BundleLayout, layer: Layer | None = None) -> list[int]:
    """The size of each part in a bundle, of `layer` if layers differ. Parts lie back to back."""
    encodings = encodings_of(layout, Layer() if layer is None else layer)
    values = layout.hidden_size * bundle_neurons(layout)
    return [stored_bytes(encoding, values) for encoding in encodings]


def formats_of(model: Model) -> str:
    """The formats of the bundles' parts, for people: BF16, or Q4_K/Q6_K where parts or layers differ."""
    layers = model.layers or [Layer()]
    encodings = [encoding for layer in layers for encoding in encodings_of(model.bundle, layer)]
    return "/".join(dict.fromkeys(encoding.format for encoding in encodings))


def resident_formats_of(model: Model) -> str:
    """The formats of the resident matrices that are stored in blocks, for people; the model's dtype: there are none."""
    formats = sorted({tensor.dtype for tensor in model.resident if tensor.dtype in BLOCK_FORMATS})
    return "/".join(formats) or model.compute_dtype


def fill_old_fields(layout: BundleLayout) -> None:
    """Sets what readers before store format 3 know instead of `parts`. The dtype stays empty, and they refuse the
    model, where a part is not plain or two parts differ."""
    formats = {part.encoding.format if is_plain(part.encoding) else "" for part in layout.parts}
    layout.old_dtype = formats.pop() if len(formats) == 1 and bundle_neurons(layout) == 1 else ""
    layout.old_parts[:] = [part.name for part in layout.parts]


def upgrade(model: Model) -> None:
    """Makes a record of store format 1 or 2, or from a daemon of that time, one of format 3. Leaves others as they are.

    In those records one dtype was that of every part and of all computing. ValueError for a dtype in which no model is
    stored.
    """
    layout = model.bundle
    if layout.parts or not layout.old_parts:
        return
    if layout.old_dtype not in COMPUTE_DTYPES.values():
        raise ValueError(f"bundles of dtype {layout.old_dtype!r}, known are {', '.join(COMPUTE_DTYPES.values())}")
    layout.parts.extend(parts_of(layout.old_parts, plain(layout.old_dtype)))
    model.compute_dtype = layout.old_dtype


def has_experts(model: Model) -> bool:
    """Whether the model is a mixture of experts, in any of its layers."""
    return any(layer.experts for layer in model.layers)


def check(model: Model) -> None:
    """ValueError unless the sizes and names of the record fit together, as all other code assumes.

    For records from outside: of a store, or of a daemon. A format that is not in DTYPES may be one of a newer version.
    """
    layout = model.bundle
    if model.compute_dtype not in COMPUTE_DTYPES.values():
        raise ValueError(f"compute dtype {model.compute_dtype!r}, known are {', '.join(COMPUTE_DTYPES.values())}")
    if not layout.parts:
        raise ValueError("bundles without parts")
    for encodings in ([part.encoding for part in layout.parts], *(layer.encodings for layer in model.layers)):
        _check_encodings(layout, encodings)
    sizes = [sum(part_bytes(layout, layer)) for layer in model.layers] or [sum(part_bytes(layout))]
    if layout.bundle_bytes != max(sizes):
        raise ValueError(f"bundles of {layout.bundle_bytes} bytes, their parts have {max(sizes)}")
    for layer in model.layers:
        _check_layer(layout, layer)
    for tensor in model.resident:
        _check_rows(tensor)
    if model.model_class and not model.activation.function:
        raise ValueError("FFNs without an activation")
    numbers = [value for _, value in model.activation.ListFields() if isinstance(value, float)]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"an activation with the numbers {', '.join(map(str, numbers))}")
    for table in model.tables:
        check(table)
        _check_table(model, table)


def _check_encodings(layout: BundleLayout, encodings: Sequence[Encoding]) -> None:
    if len(encodings) not in (0, len(layout.parts)):
        raise ValueError(f"{len(encodings)} encodings for {len(layout.parts)} parts")
    for part, encoding in zip(layout.parts, encodings, strict=False):
        if encoding.scales not in Encoding.Scales.values():
            raise ValueError(f"part {part.name!r} with scales of the unknown kind {encoding.scales}")
        of_down = bundle_neurons(layout) > 1 and part.name == layout.parts[-1].name
        values = layout.slab_neurons if of_down else layout.hidden_size
        if encoding.block_values == 0 or values % encoding.block_values != 0:
            raise ValueError(
                f"part {part.name!r} of {values} values in blocks of {encoding.block_values}, not whole blocks"
            )


def _check_rows(tensor: Tensor) -> None:
    """Of a resident tensor in blocks: it is a matrix of whole blocks."""
    if tensor.dtype not in BLOCK_FORMATS:
        return
    encoding, shape = in_blocks(tensor.dtype), list(tensor.shape)
    if len(shape) != 2 or shape[1] % encoding.block_values or tensor.size_bytes != stored_bytes(encoding, prod(shape)):
        raise ValueError(
            f"tensor {tensor.name} of shape {shape} in {tensor.size_bytes} bytes, not rows of whole blocks of "
            f"{tensor.dtype}"
        )


def _check_table(model: Model, table: Model) -> None:
    if len(table.layers) != 1 or len(table.bundle.parts) != 1 or table.layers[0].place != Layer.TABLE:
        raise ValueError(f"the table {table.name!r} is not one layer of rows")
    if (
        table.name != table_name(model.name, table.layers[0].module)
        or table.tables
        or table.import_id != model.import_id
    ):
        raise ValueError(f"the table {table.name!r} is not one of {model.name!r}")


def _check_layer(layout: BundleLayout, layer: Layer) -> None:
    """Unless it was imported before a record said how FFNs are installed: then these fields are empty."""
    if layer.place not in Layer.Place.values():
        raise ValueError(f"{layer.module} in the unknown place {layer.place}")
    if (layer.place == Layer.EXPERTS) != (layer.experts > 0):
        raise ValueError(f"{layer.module} with {layer.experts} experts in place {Layer.Place.Name(layer.place)}")
    if layer.encodings and bundle_neurons(layout) == 1:
        raise ValueError(f"{layer.module} with encodings of its own, which only slabs have")
    if layer.neurons % bundle_neurons(layout) != 0:
        raise ValueError(
            f"{layer.module} with {layer.neurons} neurons in slabs of {layout.slab_neurons}, not whole slabs"
        )
    neurons_of_cell = max(1, layout.bundles_per_cell) * bundle_neurons(layout)
    if layer.neurons % (max(1, layer.experts) * (neurons_of_cell if layer.experts else 1)) != 0:
        raise ValueError(
            f"{layer.module} with {layer.neurons} neurons of {layer.experts} experts in cells of "
            f"{layout.bundles_per_cell}, not whole cells"
        )
    if len(layer.weights) not in (0, len(layout.parts)):
        raise ValueError(f"{layer.module} with {len(layer.weights)} weights for {len(layout.parts)} parts")
    wrong = {bias.part for bias in layer.biases} - {part.name for part in layout.parts[:-1]}
    if wrong:
        raise ValueError(f"{layer.module} with biases of {', '.join(sorted(wrong))}")
