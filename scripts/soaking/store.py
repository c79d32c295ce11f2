"""The store of the soak: two planted models on flash, and bundles that can be corrupted and repaired."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from make_planted_model import make_planted_model
from planted.plan import Shape

from weightd.store.store import Store
from weightd_proto import weightd_pb2

SHAPES = {"opt": Shape("opt", 256, 8192, 4, 4, 2048, 512), "llama": Shape("llama", 256, 8192, 4, 4, 2048, 512)}
READING_S = 1.0  # a read that was under way during the repair may still deliver the corrupt bytes


def make_store(folder: Path) -> Store:
    """Makes both models and imports them."""
    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        make_planted_model(shape, folder / name)
        command = [sys.executable, "-m", "weightd", "import", str(folder / name), "--store", str(folder / "store")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Store.open(folder / "store", readonly=True)


@dataclass
class Corruption:
    """A bundle whose bytes on flash are changed during an interval of time.monotonic()."""

    model: str
    layer: int
    position: int
    neuron: int
    path: Path
    offset_bytes: int
    original: bytes
    begin_s: float = field(default_factory=time.monotonic)
    end_s: float = float("inf")

    def explains(self, model: str, says: str, begin_s: float, end_s: float) -> bool:
        """Whether this corruption explains an error of `model` between these times, and the error names it rightly."""
        named = re.search(r"layer (\d+)\D+(\d+)", says)
        return (
            model == self.model in says
            and named is not None
            and int(named[1]) == self.layer
            and int(named[2]) in (self.position, self.neuron)
            and self.begin_s <= end_s
            and begin_s <= self.end_s + READING_S
        )

    def repair(self) -> None:
        _write(self.path, self.original, self.offset_bytes)
        self.end_s = time.monotonic()


def corrupt(store: Store, chance: Random) -> Corruption:
    """Changes some bytes of a bundle of one of the models."""
    record: weightd_pb2.Model = chance.choice(store.models())
    layer = chance.randrange(len(record.layers))
    position = chance.randrange(record.layers[layer].neurons)
    cell, place = divmod(position, record.bundle.bundles_per_cell)
    offset = record.layers[layer].offset_bytes + cell * record.bundle.cell_bytes + place * record.bundle.stride_bytes
    path = store.bundles_path(record.name)
    with path.open("rb") as file:
        original = os.pread(file.fileno(), 8, offset)
    neuron = int(store.placement(record.name, layer)[position])
    made = Corruption(record.name, layer, position, neuron, path, offset, original)
    _write(path, bytes(byte ^ 0x55 for byte in original), offset)
    return made


def _write(path: Path, data: bytes, offset_bytes: int) -> None:
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), data, offset_bytes)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
