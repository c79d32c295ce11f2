"""The device profile: how long a read takes, by size and queue depth. Measured once per store and kept in its catalog.

It is measured with the daemon's own reader and O_DIRECT, on the largest bundles.bin of the store. If that is so small
that it may lie in the device's own cache, a temporary file takes its place.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

from weightd._native import measure_reads
from weightd.errors import DeviceError, SpaceError
from weightd.sizes import format_size
from weightd.store.store import CATALOG_FILE, Store
from weightd_proto.files import BUNDLES_FILE

READ_SIZES_BYTES = tuple(4096 << step for step in range(9))  # 4 KiB to 1 MiB
DEPTHS = (1, 32)
SEQUENTIAL_READ_BYTES = 1 << 20
SEQUENTIAL_DEPTH = 8
SECONDS_EACH = 0.2  # 19 measurements: about four seconds
SAMPLE_BYTES = 256 << 20
WRITE_BYTES = 16 << 20
ASSUMED_LATENCY_US = 90.0  # of a small read of an NVMe drive
FULL_SPEED = 0.9  # of the sequential speed
FULL_SPEED_READ_BYTES_DEFAULT = 512 << 10  # where nothing was measured: enough for most NVMe drives and virtual disks


@dataclass(frozen=True)
class ReadSpeed:
    """Random reads of one size at one depth."""

    read_bytes: int
    depth: int
    latency_us: float  # mean, from submission to completion
    gb_per_s: float


@dataclass(frozen=True)
class DeviceProfile:
    """The measured speed of a store's device."""

    measured_unix_s: int
    sequential_gb_per_s: float
    random: tuple[ReadSpeed, ...]

    def speed(self, read_bytes: int, depth: int) -> ReadSpeed:
        """The measurement of this size and depth. KeyError if it was not measured."""
        for row in self.random:
            if (row.read_bytes, row.depth) == (read_bytes, depth):
                return row
        raise KeyError((read_bytes, depth))

    @property
    def full_speed_bytes(self) -> int:
        """The smallest size of random reads, many at once, that reaches FULL_SPEED; the largest one if none does."""
        many = sorted((row for row in self.random if row.depth == max(DEPTHS)), key=lambda row: row.read_bytes)
        fast = [row.read_bytes for row in many if row.gb_per_s >= FULL_SPEED * self.sequential_gb_per_s]
        return min(fast, default=max((row.read_bytes for row in many), default=FULL_SPEED_READ_BYTES_DEFAULT))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DeviceProfile:
        record = json.loads(text)
        rows = tuple(ReadSpeed(**row) for row in record.pop("random"))
        return cls(random=rows, **record)


def kept_profile(store: Store) -> DeviceProfile | None:
    """The profile in the store's catalog, or None."""
    text = store.catalog.device_profile()
    return None if text is None else DeviceProfile.from_json(text)


def sequential_gb_per_s(store: Store) -> float:
    """The device's sequential speed, 0 if it was not measured."""
    profile = kept_profile(store)
    return 0.0 if profile is None else profile.sequential_gb_per_s


def full_speed_read_bytes(store: Store) -> int:
    """DeviceProfile.full_speed_bytes of the store's device."""
    profile = kept_profile(store)
    return FULL_SPEED_READ_BYTES_DEFAULT if profile is None else profile.full_speed_bytes


def known_profile(folder: Path, measure_anew: bool = False) -> DeviceProfile:
    """The profile in the catalog of the store `folder`. It is measured if there is none or if `measure_anew`, and then
    kept; that of a folder that is no store is measured and not kept. Raises as measure() does."""
    if not (folder / CATALOG_FILE).exists():
        return measure(folder)
    store = Store.open(folder, readonly=True)
    kept = None if measure_anew else kept_profile(store)
    if kept is not None:
        return kept
    profile = measure(folder)
    store.catalog.set_device_profile(profile.to_json())
    return profile


def assumed_profile(sequential_gb_per_s: float) -> DeviceProfile:
    """The profile of a flash drive of which only the sequential speed is known."""
    rows = []
    for depth in DEPTHS:
        for size in READ_SIZES_BYTES:
            latency_us = ASSUMED_LATENCY_US + size / sequential_gb_per_s / 1e3
            gb_per_s = min(sequential_gb_per_s, depth * size / latency_us / 1e3)
            rows.append(ReadSpeed(size, depth, depth * size / gb_per_s / 1e3, gb_per_s))
    return DeviceProfile(0, sequential_gb_per_s, tuple(rows))


def measure(folder: Path, io_engine: str = "auto") -> DeviceProfile:
    """Measures the device of `folder`, which may be a store or any folder that can be written.

    DeviceError if the file system refuses direct reads, SpaceError if the sample file does not fit.
    """
    with _sample(folder) as path:
        try:
            rows = tuple(_measure(path, size, depth, io_engine) for depth in DEPTHS for size in READ_SIZES_BYTES)
            sequential = measure_reads(
                str(path), SEQUENTIAL_READ_BYTES, SEQUENTIAL_DEPTH, SECONDS_EACH, False, io_engine, False
            )
        except OSError as error:
            raise DeviceError(f"cannot read {path} directly: {error}") from error
    return DeviceProfile(int(time.time()), sequential["bytes"] / sequential["seconds"] / 1e9, rows)


def _measure(path: Path, read_bytes: int, depth: int, io_engine: str) -> ReadSpeed:
    taken = measure_reads(str(path), read_bytes, depth, SECONDS_EACH, True, io_engine, False)
    latency_us = taken["seconds"] * depth / taken["reads"] * 1e6
    return ReadSpeed(read_bytes, depth, latency_us, taken["bytes"] / taken["seconds"] / 1e9)


@contextmanager
def _sample(folder: Path) -> Iterator[Path]:
    """A file of at least SAMPLE_BYTES on the device."""
    largest = max(folder.glob(f"*/{BUNDLES_FILE}"), key=lambda path: path.stat().st_size, default=None)
    if largest is not None and largest.stat().st_size >= SAMPLE_BYTES:
        yield largest
        return
    try:
        with NamedTemporaryFile(dir=folder, prefix=".profile-") as file:
            write_sample(file.fileno(), SAMPLE_BYTES)
            yield Path(file.name)
    except OSError as error:
        raise SpaceError(
            f"cannot write a sample of {format_size(SAMPLE_BYTES)} in {folder}: {error.strerror}"
        ) from error


def write_sample(descriptor: int, size_bytes: int) -> None:
    """Fills a file with random bytes, which no device can compress, syncs it and drops it from the page cache."""
    for _ in range(0, size_bytes, WRITE_BYTES):
        data = os.urandom(WRITE_BYTES)
        assert os.write(descriptor, data) == len(data)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
