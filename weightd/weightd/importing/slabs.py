"""Slabs: bundles of many neurons, in which the quantised blocks of a checkpoint stay as they were published.

Blocks of a gate or up matrix lie along the inputs, so each neuron has whole ones. Those of a down matrix lie along the
neurons. A slab has as many neurons as such a block, or several, and from each row of the down matrix the blocks of
these neurons. Nothing is quantised again. A part that cannot be kept is stored in its own dtype, in F32 if it was
quantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightd.errors import CheckpointError
from weightd.importing.dequantise import first_unusable
from weightd.importing.quantised.by_neuron import neuron_format
from weightd.importing.units import Unit, UnitPart
from weightd_proto.encodings import (
    COMPUTE_DTYPES,
    DTYPES,
    SLAB_NEURONS_MIN,
    in_blocks,
    is_plain,
    plain,
    stored_bytes,
)
from weightd_proto.weightd_pb2 import BundleLayout, Encoding

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Slabs:
    """`layers`: the encodings of each layer's parts."""

    neurons: int
    layers: tuple[tuple[Encoding, ...], ...]
    notes: tuple[str, ...] = ()


def slabs_of(units: Sequence[Unit]) -> Slabs | None:
    """How the FFNs are stored in slabs; None where no part is quantised in a format that kernels compute with.

    CheckpointError where parts are, but the neurons of an FFN are not whole slabs.
    """
    by_layer: dict[int, list[Unit]] = {}
    for unit in units:
        by_layer.setdefault(unit.layer, []).append(unit)
    layers = tuple(tuple(_encodings(of_layer)) for of_layer in by_layer.values())
    neurons = max(SLAB_NEURONS_MIN, *(encodings[-1].block_values for encodings in layers))
    if any(unit.neurons % neurons for unit in units):  # as where shared experts have larger blocks than routed ones
        neurons, layers = SLAB_NEURONS_MIN, tuple(map(_with_short_blocks, layers))
    if all(is_plain(encoding) for encodings in layers for encoding in encodings):
        return None
    for unit in units:
        if unit.neurons % neurons:
            raise CheckpointError(
                f"layer {unit.layer} has {unit.neurons} neurons, which are not whole slabs of {neurons}"
            )
    return Slabs(neurons, layers, tuple(_notes(units, layers)))


def _with_short_blocks(encodings: tuple[Encoding, ...]) -> tuple[Encoding, ...]:
    """The encodings of a layer in slabs of SLAB_NEURONS_MIN, where a down matrix with longer blocks cannot be kept."""
    *rows, down = encodings
    return (*rows, plain("F32") if down.block_values > SLAB_NEURONS_MIN else down)


def _encodings(units: Sequence[Unit]) -> Iterator[Encoding]:
    """Of one layer's parts. Experts whose matrices are stored differently have none in common but a plain one."""
    for parts in zip(*(unit.parts for unit in units), strict=True):
        down = parts[0] is units[0].parts[-1]
        kept = {_kept(part, down).SerializeToString(deterministic=True) for part in parts}
        yield Encoding.FromString(kept.pop()) if len(kept) == 1 else plain("F32")


def _kept(part: UnitPart, down: bool) -> Encoding:
    tensor, format = part.matrix.tensor, part.matrix.tensor.kept_format
    if tensor.is_plain:
        return tensor.encoding if tensor.dtype in COMPUTE_DTYPES.values() and tensor.undo is None else plain("F32")
    along_inputs = part.columns == tensor.in_columns
    if down and format:
        whole = not along_inputs and part.step == 1 and part.first % in_blocks(format).block_values == 0
    else:
        whole = along_inputs
    return in_blocks(format) if format and whole and tensor.undo is None else plain(tensor.dtype)


def _notes(units: Sequence[Unit], layers: Sequence[Sequence[Encoding]]) -> Iterator[str]:
    kept = dict.fromkeys(each.format for encodings in layers for each in encodings if not is_plain(each))
    by_neuron = "--layout neuron" if neuron_format(units) else "--dtype bf16, int8 or int4"
    yield (
        f"the FFNs stay quantised as published ({', '.join(kept)}), for exact mode; for predict mode import with "
        f"{by_neuron}"
    )
    widened = dict.fromkeys(
        part.matrix.tensor.name
        for unit in units
        for part, encoding in zip(unit.parts, layers[unit.layer], strict=True)
        if is_plain(encoding) and not part.matrix.tensor.is_plain
        if part.matrix.tensor.scales is None or part.matrix.tensor.kept_format  # else with_kept_formats() says why
    )
    if widened:
        names = list(widened)
        first = next(p.matrix.tensor for unit in units for p in unit.parts if p.matrix.tensor.name == names[0])
        count, format = f"{len(names)} tensor{'s' * (len(names) > 1)}", first.encoding.format
        yield f"{count} cannot be kept and become {first.dtype}, first {first.name}, of {format}"


# Cutting


@dataclass(frozen=True)
class SlabPart:
    """Where a part of a run of slabs lies, as in CutPart. `data`: rows of a matrix, in the encoding of the slabs."""

    data: Bytes
    encoding: Encoding
    columns: bool
    first: int
    step: int


def cut_slabs(layout: BundleLayout, parts: Sequence[SlabPart], cells: Bytes, count: int) -> None:
    """Fills `cells` with `count` slabs, and with zeros.

    Raises:
        UnusableScale: the first one in a slab.
    """
    cells[:] = 0
    begin_bytes = 0
    for number, part in enumerate(parts):
        values = _down(layout, part, count) if number == len(parts) - 1 else _rows(layout, part, count)
        _place(layout, part.encoding, values, cells, begin_bytes, number)
        begin_bytes += values.shape[1]


def cut_rows(layout: BundleLayout, parts: Sequence[Bytes], cells: Bytes, count: int) -> None:
    """Fills `cells` with `count` neurons, or rows of a table, and with zeros. `parts`: rows in blocks, of each part.

    Raises UnusableScale.
    """
    cells[:] = 0
    begin_bytes = 0
    for number, (part, rows) in enumerate(zip(layout.parts, parts, strict=True)):
        _place(layout, part.encoding, rows.reshape(count, -1), cells, begin_bytes, number)
        begin_bytes += rows.size // count


def _place(
    layout: BundleLayout, encoding: Encoding, values: Bytes, cells: Bytes, begin_bytes: int, number: int
) -> None:
    """Puts a part of each bundle, values [bundles, bytes], into its place in the cells."""
    if not is_plain(encoding) and (block := first_unusable(encoding.format, values)) is not None:
        raise UnusableScale(number, block * encoding.block_bytes // values.shape[1])
    per_cell = layout.bundles_per_cell
    by_cell = cells.reshape(-1, layout.cell_bytes)[:, : per_cell * layout.stride_bytes]
    by_bundle = by_cell.reshape(-1, per_cell, layout.stride_bytes)
    end_bytes = begin_bytes + values.shape[1]
    whole, count = len(values) // per_cell, len(values)
    by_bundle[:whole, :, begin_bytes:end_bytes] = values[: whole * per_cell].reshape(whole, per_cell, -1)
    if count % per_cell:
        by_bundle[whole, : count % per_cell, begin_bytes:end_bytes] = values[whole * per_cell :]


def _rows(layout: BundleLayout, part: SlabPart, count: int) -> Bytes:
    """Of a gate or up matrix: [slabs, bytes]."""
    neurons = count * layout.slab_neurons
    if part.columns and is_plain(part.encoding):
        return _numbers(layout, part, neurons).T.reshape(count, -1).view(np.uint8)
    if part.columns:
        blocks = _blocks(part, layout.hidden_size // part.encoding.block_values, -1)
        columns = np.ascontiguousarray(blocks[:, part.first :: part.step][:, :neurons].T)
        return columns.reshape(count, -1).view(np.uint8)
    row_bytes = stored_bytes(part.encoding, layout.hidden_size)
    rows = part.data.reshape(-1, row_bytes)[part.first :: part.step][:neurons]
    return np.ascontiguousarray(rows).reshape(count, -1)


def _down(layout: BundleLayout, part: SlabPart, count: int) -> Bytes:
    """Of a down matrix: [slabs, bytes]."""
    hidden, neurons = layout.hidden_size, layout.slab_neurons
    if not part.columns and not is_plain(part.encoding):  # a row of blocks for as many neurons
        begin, end = (of // part.encoding.block_values for of in (part.first, part.first + count * neurons))
        of_slabs = _blocks(part, -1, hidden)[begin:end]
        by_output = of_slabs.reshape(count, -1, hidden).swapaxes(1, 2)
        return np.ascontiguousarray(by_output).reshape(count, -1).view(np.uint8)
    if not part.columns:  # a row for each neuron
        size_bytes = part.encoding.block_bytes
        rows = part.data.view(f"u{size_bytes}").reshape(-1, hidden)[part.first :: part.step][: count * neurons]
        by_slab = rows.reshape(count, neurons, hidden).swapaxes(1, 2)
        return np.ascontiguousarray(by_slab).reshape(count, -1).view(np.uint8)
    if is_plain(part.encoding):
        values = _numbers(layout, part, count * neurons).reshape(hidden, count, neurons)
        return np.ascontiguousarray(values.swapaxes(0, 1)).reshape(count, -1).view(np.uint8)
    of_slab = np.dtype((np.void, stored_bytes(part.encoding, neurons)))
    blocks = part.data.reshape(hidden, -1)
    begin = part.first // part.encoding.block_values * part.encoding.block_bytes
    taken = blocks[:, begin : begin + count * of_slab.itemsize]
    items = np.ascontiguousarray(taken).view(of_slab)  # [hidden, slabs]
    return np.ascontiguousarray(items.T).view(np.uint8)


def _blocks(part: SlabPart, rows: int, columns: int) -> npt.NDArray[np.void]:
    """Of a matrix whose blocks hold numbers of one column, as items that numpy copies as a whole."""
    return part.data.view(np.dtype((np.void, part.encoding.block_bytes))).reshape(rows, columns)


def _numbers(layout: BundleLayout, part: SlabPart, neurons: int) -> npt.NDArray[np.generic]:
    """Columns of a plain matrix [hidden_size, ...], as unsigned integers of their bits: [hidden_size, neurons]."""
    matrix = part.data.view(f"u{DTYPES[part.encoding.format].bytes}").reshape(layout.hidden_size, -1)
    columns: npt.NDArray[np.generic] = matrix[:, part.first :: part.step][:, :neurons]
    return columns


class UnusableScale(ValueError):
    """A block whose scale is NaN or infinite. `part` and `slab`, which of a table is a row, say where."""

    def __init__(self, part: int, slab: int) -> None:
        super().__init__(part, slab)
        self.part = part
        self.slab = slab
