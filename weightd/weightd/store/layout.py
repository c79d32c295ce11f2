"""Where bundles lie: the arithmetic of weightd.v1.BundleLayout and of layer extents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from weightd._native import BundleShape
from weightd.sizes import round_up
from weightd_proto.encodings import fill_old_fields, part_bytes
from weightd_proto.weightd_pb2 import BundleLayout, BundlePart, Layer

# Bundles of a cell start on cache lines, so that the kernels read whole ones.
STRIDE_ALIGNMENT_BYTES = 64


def bundle_layout(parts: Sequence[BundlePart], hidden_size: int, block_bytes: int) -> BundleLayout:
    """The layout of bundles of `parts` (`hidden_size` values each) on blocks of `block_bytes`.

    Small bundles share a block; a larger one is a cell of its own, padded to the block size.
    """
    layout = BundleLayout(parts=parts, hidden_size=hidden_size, block_bytes=block_bytes)
    layout.bundle_bytes = sum(part_bytes(layout))
    layout.stride_bytes = round_up(layout.bundle_bytes, STRIDE_ALIGNMENT_BYTES)
    layout.bundles_per_cell = max(1, block_bytes // layout.stride_bytes)
    layout.cell_bytes = block_bytes if layout.bundles_per_cell > 1 else round_up(layout.bundle_bytes, block_bytes)
    fill_old_fields(layout)
    return layout


def lay_out_layers(layout: BundleLayout, layers: Iterable[Layer]) -> int:
    """Lays the layers out back to back: sets their cells and offsets. Returns the bytes of bundles.bin."""
    offset_bytes = 0
    for layer in layers:
        layer.cells = -(-layer.neurons // layout.bundles_per_cell)
        layer.offset_bytes = offset_bytes
        offset_bytes += layer.cells * layout.cell_bytes
    return offset_bytes


def native_shape(layout: BundleLayout) -> BundleShape:
    """The same layout, for the functions in C++."""
    return BundleShape.make(
        parts=[part.encoding for part in layout.parts],
        hidden_size=layout.hidden_size,
        stride_bytes=layout.stride_bytes,
        bundles_per_cell=layout.bundles_per_cell,
        cell_bytes=layout.cell_bytes,
    )
