"""A store with one model of made-up numbers, written by hand: what the daemon must serve, known byte for byte."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightd import _native
from weightd.store import BUNDLES_FILE, FILES_FOLDER, RESIDENT_FILE, Store
from weightd_proto import weightd_pb2

BLOCK_BYTES = 4096
RESIDENT_BYTES = 3 << 20


@dataclass(frozen=True)
class TinyModel:
    """What was written. bundles[layer] is [neurons, bundle_bytes], uint8."""

    record: weightd_pb2.Model
    bundles: list[npt.NDArray[np.uint8]]
    resident: bytes
    config: bytes

    @property
    def ffn_bytes(self) -> int:
        return sum(layer.cells for layer in self.record.layers) * self.record.bundle.cell_bytes


def write_model(
    folder: Path,
    name: str = "tiny",
    layers: int = 2,
    neurons: int = 101,
    bundle_bytes: int = 96,
    seed: int = 0,
    config_bytes: int = 0,
) -> TinyModel:
    """Adds a model of random bundles and resident bytes to the store at `folder`, made if there is none."""
    random = np.random.default_rng(seed)
    layout = _layout(bundle_bytes)
    bundles = [random.integers(0, 256, (neurons, bundle_bytes), dtype=np.uint8) for _ in range(layers)]
    resident = random.bytes(RESIDENT_BYTES)
    config = json.dumps({"model_type": name}).encode().ljust(config_bytes)
    cells = -(-neurons // layout.bundles_per_cell)
    record = weightd_pb2.Model(
        name=name,
        family="llama",
        bundle=layout,
        layers=[
            weightd_pb2.Layer(module=f"{i}", neurons=neurons, cells=cells, offset_bytes=i * cells * layout.cell_bytes)
            for i in range(layers)
        ],
        bundles_file_bytes=layers * cells * layout.cell_bytes,
        resident=[_tensor(resident)],
        resident_file_bytes=len(resident),
        files=[weightd_pb2.File(name="config.json", size_bytes=len(config), checksum=_checksum(config))],
        import_id=random.bytes(16),
    )
    with Store.open(folder, create=True).begin_import(name) as staging:
        with (staging.folder / BUNDLES_FILE).open("wb") as file:
            for layer in bundles:
                file.write(_cells(layer, layout))
        (staging.folder / RESIDENT_FILE).write_bytes(resident)
        (staging.folder / FILES_FOLDER).mkdir()
        (staging.folder / FILES_FOLDER / "config.json").write_bytes(config)
        sums = [np.array([_checksum(row.tobytes()) for row in layer], dtype=np.uint64) for layer in bundles]
        staging.publish(record, sums)
    return TinyModel(record, bundles, resident, config)


def _layout(bundle_bytes: int) -> weightd_pb2.BundleLayout:
    stride_bytes = -(-bundle_bytes // 64) * 64
    per_cell = max(1, BLOCK_BYTES // stride_bytes)
    return weightd_pb2.BundleLayout(
        dtype="F32",
        parts=["gate", "up", "down"],
        hidden_size=bundle_bytes // 12,
        bundle_bytes=bundle_bytes,
        stride_bytes=stride_bytes,
        bundles_per_cell=per_cell,
        cell_bytes=BLOCK_BYTES if per_cell > 1 else -(-bundle_bytes // BLOCK_BYTES) * BLOCK_BYTES,
        block_bytes=BLOCK_BYTES,
    )


def _cells(bundles: npt.NDArray[np.uint8], layout: weightd_pb2.BundleLayout) -> bytes:
    per_cell = layout.bundles_per_cell
    cells = np.zeros((-(-len(bundles) // per_cell), layout.cell_bytes), dtype=np.uint8)
    for position, bundle in enumerate(bundles):
        start = position % per_cell * layout.stride_bytes
        cells[position // per_cell, start : start + len(bundle)] = bundle
    return cells.tobytes()


def _tensor(resident: bytes) -> weightd_pb2.Tensor:
    return weightd_pb2.Tensor(
        name="embed", dtype="F32", shape=[len(resident) // 4], size_bytes=len(resident), checksum=_checksum(resident)
    )


def _checksum(data: bytes) -> int:
    return int(_native.checksum(np.frombuffer(data, dtype=np.uint8)))
