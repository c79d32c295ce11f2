"""Where bundles lie: the arithmetic of weightd.v1.BundleLayout and of layer extents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from weightd._native import BundleShape
from weightd.sizes import round_up
from weightd_proto.encodings import bundle_neurons, bundles_in, fill_old_fields, is_plain, part_bytes, plain
from weightd_proto.weightd_pb2 import BundleLayout, BundlePart, Layer

# Bundles of a cell start on cache lines, so that the kernels read whole ones.
STRIDE_ALIGNMENT_BYTES = 64
# Of a mixture of experts. A session has the guarantee of a few cells, and a Fetch holds one at a time.
EXPERT_CELL_BYTES_MAX = 2 << 20


def bundle_layout(
    parts: Sequence[BundlePart],
    hidden_size: int,
    block_bytes: int,
    sector_bytes: int = 0,
    slab_neurons: int = 0,
    layers: Iterable[Layer] = (),
) -> BundleLayout:
    """The layout of bundles of `parts` (`hidden_size` values each) on blocks of `block_bytes`.

    For FFNs whose neurons are read one by one. Small bundles share a block; a larger one is a cell of its own, padded
    to the block size. Quantised bundles, which often are a little larger than a block or half of one, are padded to
    sectors of `sector_bytes` instead, unless that is 0. Slabs of `layers` may have encodings of their own; the largest
    decides.
    """
    layout = BundleLayout(parts=parts, hidden_size=hidden_size, block_bytes=block_bytes, slab_neurons=slab_neurons)
    layout.bundle_bytes = max((sum(part_bytes(layout, layer)) for layer in layers), default=sum(part_bytes(layout)))
    layout.stride_bytes = round_up(layout.bundle_bytes, STRIDE_ALIGNMENT_BYTES)
    layout.bundles_per_cell = max(1, block_bytes // layout.stride_bytes)
    layout.cell_bytes = block_bytes if layout.bundles_per_cell > 1 else round_up(layout.bundle_bytes, block_bytes)
    if sector_bytes and not all(is_plain(part.encoding) for part in parts):
        bundles = range(1, layout.bundles_per_cell + 1)
        cells = {count: round_up(count * layout.stride_bytes, sector_bytes) for count in bundles}
        layout.bundles_per_cell = min(bundles, key=lambda count: cells[count] / count)
        layout.cell_bytes = cells[layout.bundles_per_cell]
    fill_old_fields(layout)
    return layout


def model_layout(
    parts: Sequence[BundlePart],
    hidden_size: int,
    layers: Iterable[Layer],
    block_bytes: int,
    read_bytes: int,
    sector_bytes: int = 0,
    slab_neurons: int = 0,
) -> BundleLayout:
    """The layout of a model with these layers.

    The bundles of an expert are read together. So a cell of a model with experts holds the fewest bundles that have
    `read_bytes`, but always a divisor of an expert's, so that each expert begins with a cell. No cell is larger than
    EXPERT_CELL_BYTES_MAX, unless one bundle is.

    Args:
        read_bytes: the size of reads from which on the device has its full speed (device_profile.py).
        sector_bytes: of the device; see bundle_layout().
    """
    layers = list(layers)
    layout = bundle_layout(parts, hidden_size, block_bytes, sector_bytes, slab_neurons, layers)
    of_experts = [bundles_in(layout, layer) // layer.experts for layer in layers if layer.experts]
    if not of_experts:
        return layout
    layout.bundles_per_cell = 1
    for bundles in _divisors(math.gcd(*of_experts)):
        if bundles > 1 and round_up(bundles * layout.stride_bytes, block_bytes) > EXPERT_CELL_BYTES_MAX:
            break
        layout.bundles_per_cell = bundles
        if bundles * layout.stride_bytes >= read_bytes:
            break
    layout.cell_bytes = round_up(layout.bundles_per_cell * layout.stride_bytes, block_bytes)
    return layout


def _divisors(number: int) -> list[int]:
    """In ascending order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def lay_out_layers(layout: BundleLayout, layers: Iterable[Layer]) -> int:
    """Lays the layers out, each from a block on: sets their cells and offsets. Returns the bytes of bundles.bin."""
    offset_bytes = 0
    for layer in layers:
        layer.cells = -(-bundles_in(layout, layer) // layout.bundles_per_cell)
        layer.offset_bytes = offset_bytes
        offset_bytes += round_up(layer.cells * layout.cell_bytes, layout.block_bytes)
    return offset_bytes


def native_shape(layout: BundleLayout) -> BundleShape:
    """The same layout, for the functions in C++."""
    if bundle_neurons(layout) > 1:  # to C++ a slab is so many bytes
        parts, hidden_size = [plain("I8")], layout.bundle_bytes
    else:
        parts, hidden_size = [part.encoding for part in layout.parts], layout.hidden_size
    return BundleShape.make(
        parts=parts,
        hidden_size=hidden_size,
        stride_bytes=layout.stride_bytes,
        bundles_per_cell=layout.bundles_per_cell,
        cell_bytes=layout.cell_bytes,
    )
