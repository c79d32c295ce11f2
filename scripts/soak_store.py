"""The store of the soak: two planted models on flash, bundles that can be corrupted and repaired, and their weightd."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from make_planted_model import make_planted_model
from planted_calibration import publish_planted
from planted_plan import Shape

from flashclient.embedded import PrivateDaemon, is_serving
from weightd.served_models import demand_of
from weightd.store import Store
from weightd_proto import weightd_pb2

SHAPES = {"opt": Shape("opt", 256, 8192, 4, 4, 2048, 512), "llama": Shape("llama", 256, 8192, 4, 4, 2048, 512)}
POOL_SHARE = 0.7  # of all bundles: enough for the rings and shares of all clients, too little for what they want
START_WITHIN_S = 60.0
POLL_S = 0.05
READING_S = 1.0  # a read that was under way when the bundle was repaired answers whoever asks for it meanwhile


def make_store(folder: Path) -> Store:
    """Makes both models and imports them."""
    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        make_planted_model(shape, folder / name)
        command = [sys.executable, "-m", "weightd", "import", str(folder / name), "--store", str(folder / "store")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Store.open(folder / "store", readonly=True)


class MortalWeightd:
    """The daemon at one address. `down` are the times of time.monotonic() in which it did not serve."""

    def __init__(self, store: Store, folder: Path) -> None:
        demands = [demand_of(model) for model in store.models()]
        bundles_bytes = sum(model.bundles_file_bytes for model in store.models())
        self.dram_bytes = sum(demand.minimum_bytes for demand in demands) + int(POOL_SHARE * bundles_bytes)
        self._daemon = PrivateDaemon.start(folder / "store", self.dram_bytes)
        self.down: list[tuple[float, float]] = []
        self._killed_s: float | None = None
        self.wait()
        for name in SHAPES:
            publish_planted(folder / name, name, self.address)

    @property
    def address(self) -> str:
        return self._daemon.address

    @property
    def pid(self) -> int:
        return self._daemon.pid

    def kill(self) -> None:
        self._killed_s = time.monotonic()
        os.kill(self.pid, signal.SIGKILL)

    def start_again(self) -> None:
        while not self._daemon.has_ended():
            time.sleep(POLL_S)
        self._daemon.revive()

    def serves(self) -> bool:
        """Whether it does now; takes note of the end of a time in which it did not."""
        if self._killed_s is None:
            return True
        if self._daemon.has_ended() or not is_serving(self.address):
            return False
        self.down.append((self._killed_s, time.monotonic()))
        self._killed_s = None
        return True

    def was_down(self, begin_s: float, end_s: float) -> bool:
        down = [*self.down, *([(self._killed_s, end_s)] if self._killed_s is not None else [])]
        return any(first <= end_s and begin_s <= last for first, last in down)

    def wait(self) -> None:
        give_up_s = time.monotonic() + START_WITHIN_S
        while self._daemon.has_ended() or not is_serving(self.address):
            if self._daemon.has_ended() or time.monotonic() > give_up_s:
                raise RuntimeError(f"weightd does not serve: {self._daemon.last_words()}")
            time.sleep(POLL_S)
        self.serves()

    def stop(self) -> None:
        self._daemon.stop()


@dataclass
class Corruption:
    """A bundle whose bytes on flash were changed, from one time of time.monotonic() to another."""

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
        """Whether an error of a generation of `model` between these times is this one, named as it should be."""
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
