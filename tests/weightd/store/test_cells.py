"""The cells of models with experts and of quantised models, and the reads of a device that decide their size."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightd.store.device_profile import (
    FULL_SPEED_READ_BYTES_DEFAULT,
    DeviceProfile,
    ReadSpeed,
    full_speed_read_bytes,
)
from weightd.store.layout import EXPERT_CELL_BYTES_MAX, bundle_layout, lay_out_layers, model_layout
from weightd.store.store import Store
from weightd_proto.encodings import in_blocks, parts_of, plain
from weightd_proto.weightd_pb2 import BundleLayout, Layer

KIB = 1 << 10


def layout_of(hidden_size: int, widths: list[int], read_bytes: int, parts: int = 3) -> BundleLayout:
    named = parts_of(("gate", "up", "down")[-parts:], plain("BF16"))
    layers = [Layer(neurons=8 * width, experts=8) for width in widths]
    return model_layout(named, hidden_size, [*layers, Layer(neurons=77)], 4096, read_bytes)


@pytest.mark.parametrize(
    ("hidden_size", "widths", "read_bytes", "bundles_per_cell"),
    [
        (2048, [1024], 512 * KIB, 64),  # OLMoE: 768 KiB, 16 cells an expert
        (2048, [1024], 1024 * KIB, 128),
        (2048, [1024], 64 * KIB, 8),
        (4096, [14336], 512 * KIB, 28),  # Mixtral 8x7B: 672 KiB
        (2880, [2880], 512 * KIB, 32),  # gpt-oss
        (2048, [768], 4096 * KIB, 128),  # never more than EXPERT_CELL_BYTES_MAX: 1.5 MiB
        (2048, [1024, 1536], 512 * KIB, 64),  # both widths are whole cells
        (2048, [1021], 512 * KIB, 1),  # a prime width, and an expert of 12 MiB
        (64, [48], 512 * KIB, 48),  # a tiny expert is one cell
        (16384, [512], 64 * KIB, 1),
    ],
)
def test_cells_of_experts(hidden_size: int, widths: list[int], read_bytes: int, bundles_per_cell: int) -> None:
    layout = layout_of(hidden_size, widths, read_bytes)
    assert layout.bundles_per_cell == bundles_per_cell
    assert layout.cell_bytes % 4096 == 0
    assert 0 <= layout.cell_bytes - bundles_per_cell * layout.stride_bytes < 4096
    assert layout.cell_bytes <= EXPERT_CELL_BYTES_MAX
    assert all(width % bundles_per_cell == 0 for width in widths)


def test_a_bundle_without_a_gate() -> None:
    assert layout_of(2048, [1024], 512 * KIB, parts=2).bundles_per_cell == 64


def test_a_model_without_experts_has_cells_of_single_bundles() -> None:
    parts = parts_of(("gate", "up", "down"), plain("BF16"))
    assert model_layout(parts, 2048, [Layer(neurons=77)], 4096, 512 * KIB) == bundle_layout(parts, 2048, 4096)


def profile(*gb_per_s: float) -> DeviceProfile:
    """Of reads of 64 KiB, 128 KiB, and so on, many at once; the sequential speed is 2 GB/s."""
    many = [ReadSpeed(64 * KIB << i, 32, 1.0, speed) for i, speed in enumerate(gb_per_s)]
    return DeviceProfile(0, 2.0, (ReadSpeed(4 * KIB, 1, 1.0, 9.0), *many))


@pytest.mark.parametrize(
    ("measured", "read_bytes"),
    [
        (None, FULL_SPEED_READ_BYTES_DEFAULT),
        (profile(0.5, 1.7, 1.8, 2.0), 256 * KIB),
        (profile(1.9, 1.9, 2.0, 2.0), 64 * KIB),
        (profile(0.5, 1.0, 1.2, 1.4), 512 * KIB),  # none is fast: the largest
    ],
)
def test_reads_at_full_speed(tmp_path: Path, measured: DeviceProfile | None, read_bytes: int) -> None:
    store = Store.open(tmp_path / "store", create=True)
    if measured is not None:
        store.catalog.set_device_profile(measured.to_json())
    assert full_speed_read_bytes(store) == read_bytes


@pytest.mark.parametrize(
    ("format", "hidden_size", "parts", "bundles_per_cell", "cell_bytes"),
    [
        ("Q8_0", 2048, 2, 1, 4608),  # OPT-1.3B: 4352 bytes, of which blocks would make 8192
        ("IQ4_NL", 2048, 2, 1, 2560),
        ("IQ4_NL", 4096, 3, 1, 7168),
        ("IQ4_NL", 640, 3, 3, 3584),  # Gemma 3 270M: three bundles of 1088
        ("Q8_0", 64, 2, 8, 1536),  # whole sectors without any padding
    ],
)
def test_cells_of_quantised_bundles_are_whole_sectors(
    format: str, hidden_size: int, parts: int, bundles_per_cell: int, cell_bytes: int
) -> None:
    named = parts_of(("gate", "up", "down")[-parts:], in_blocks(format))
    layout = bundle_layout(named, hidden_size, 4096, 512)
    assert (layout.bundles_per_cell, layout.cell_bytes) == (bundles_per_cell, cell_bytes)
    layers = [Layer(neurons=5), Layer(neurons=5)]
    assert lay_out_layers(layout, layers) % 4096 == 0
    assert layers[1].offset_bytes % 4096 == 0
    assert bundle_layout(named, hidden_size, 4096, 4096) == bundle_layout(named, hidden_size, 4096)


def test_cells_of_plain_bundles_are_whole_blocks() -> None:
    parts = parts_of(("up", "down"), plain("BF16"))
    assert bundle_layout(parts, 2100, 4096, 512) == bundle_layout(parts, 2100, 4096)
