"""Where bundles lie: the arithmetic of weightd.v1.BundleLayout and of layer extents."""

from __future__ import annotations

from collections.abc import Sequence

from weightd._native import BundleShape
from weightd.sizes import round_up
from weightd_proto import weightd_pb2

# Bundles of a cell start on cache lines, so that the kernels read whole ones.
STRIDE_ALIGNMENT_BYTES = 64
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


def bundle_layout(dtype: str, parts: Sequence[str], hidden_size: int, block_bytes: int) -> weightd_pb2.BundleLayout:
    """The layout of bundles of `parts` (`hidden_size` elements of `dtype` each) on blocks of `block_bytes`.

    Small bundles share a block; a larger one is a cell of its own, padded to the block size.
    """
    bundle_bytes = len(parts) * hidden_size * DTYPE_BYTES[dtype]
    stride_bytes = round_up(bundle_bytes, STRIDE_ALIGNMENT_BYTES)
    bundles_per_cell = max(1, block_bytes // stride_bytes)
    return weightd_pb2.BundleLayout(
        dtype=dtype,
        parts=parts,
        hidden_size=hidden_size,
        bundle_bytes=bundle_bytes,
        stride_bytes=stride_bytes,
        bundles_per_cell=bundles_per_cell,
        cell_bytes=block_bytes if bundles_per_cell > 1 else round_up(bundle_bytes, block_bytes),
        block_bytes=block_bytes,
    )


def lay_out_layers(
    layout: weightd_pb2.BundleLayout, modules: Sequence[tuple[str, int]]
) -> tuple[list[weightd_pb2.Layer], int]:
    """Layers back to back for (module, neurons) pairs, and the bytes of bundles.bin."""
    layers: list[weightd_pb2.Layer] = []
    offset_bytes = 0
    for module, neurons in modules:
        cells = -(-neurons // layout.bundles_per_cell)
        layers.append(weightd_pb2.Layer(module=module, neurons=neurons, cells=cells, offset_bytes=offset_bytes))
        offset_bytes += cells * layout.cell_bytes
    return layers, offset_bytes


def native_shape(layout: weightd_pb2.BundleLayout) -> BundleShape:
    """The same layout, for the functions in C++."""
    return BundleShape.make(
        dtype=layout.dtype,
        hidden_size=layout.hidden_size,
        row_parts=len(layout.parts) - 1,
        stride_bytes=layout.stride_bytes,
        bundles_per_cell=layout.bundles_per_cell,
        cell_bytes=layout.cell_bytes,
    )
