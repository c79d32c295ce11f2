"""A catalog that is damaged, full or half written: it is refused in one line or still right, never a wrong record."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from byte_flips import flip_bit
from daemon import refused, serving
from repository import FIXTURES
from small_disk import fill, small_disk
from tiny_store import write_model

from weightd import _native
from weightd.cli import main
from weightd.errors import CorruptionError, SpaceError, StoreError
from weightd.store.catalog import META_KEY, array_key
from weightd.store.staged_folder import set_aside
from weightd.store.store import CATALOG_FILE, CHECKSUMS, FILES_FOLDER, PLACEMENT, Store
from weightd.store.verify import verify_model
from weightd_proto import weightd_pb2 as pb

LAYERS, NEURONS = 3, 700


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Several models, one of them removed again: there are free pages, and values larger than a page."""
    path = tmp_path / "store"
    for number in range(4):
        write_model(path, f"m{number}", layers=LAYERS, neurons=NEURONS, seed=number)
    with Store.open(path) as opened:
        opened.remove("m1")
    return path


def one_line(store: Path, *words: str) -> None:
    """Asserts that a command and the daemon refuse the store in one line that has these words."""
    listed = subprocess.run(
        [sys.executable, "-m", "weightd", "ls", "--store", str(store)], capture_output=True, text=True, check=False
    )
    for status, error in ((listed.returncode, listed.stderr), refused(store, "--listen", f"unix:{store}.sock")):
        assert status == 1, error
        assert error.count("\n") == 1
        for word in words:
            assert word in error


def test_a_catalog_cut_short_is_one_line(store: Path) -> None:
    path = store / CATALOG_FILE
    whole = path.read_bytes()
    for length in (len(whole) - 4096, len(whole) // 2, 3 * 4096, 2 * 4096, 4096 + 100, 4096, 17):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match="catalog"):
            Store.open(store, readonly=True)
    path.write_bytes(b"")
    with pytest.raises(CorruptionError, match="it is empty"):
        Store.open(store, readonly=True)
    one_line(store, "catalog")
    path.write_bytes(whole)
    with Store.open(store) as opened:
        assert opened.names() == ["m0", "m2", "m3"]


def test_garbage_in_the_place_of_a_catalog_is_one_line(store: Path) -> None:
    size_bytes = (store / CATALOG_FILE).stat().st_size
    (store / CATALOG_FILE).write_bytes(os.urandom(size_bytes))
    one_line(store, "catalog")


def test_zeros_in_the_place_of_pages_are_one_line(store: Path) -> None:
    """The contents that a file system may leave in blocks that were not synced before a power loss."""
    path = store / CATALOG_FILE
    whole = path.read_bytes()
    for page in range(len(whole) // 4096):
        path.write_bytes(whole[: page * 4096] + bytes(4096) + whole[(page + 1) * 4096 :])
        refused_or_right(store)


def test_a_bit_flipped_anywhere_in_the_catalog_is_refused_or_without_effect(store: Path) -> None:
    path = store / CATALOG_FILE
    size_bytes = path.stat().st_size
    headers = [page * 4096 + at for page in range(size_bytes // 4096) for at in range(0, 64, 3)]
    for offset_bytes in [*headers, *range(0, size_bytes, 1009)]:
        flip_bit(path, offset_bytes)
        refused_or_right(store)
        flip_bit(path, offset_bytes)
    refused_or_right(store)


def refused_or_right(path: Path) -> None:
    try:
        with Store.open(path, readonly=True) as store:
            for model in store.models():
                for layer in range(LAYERS):
                    assert len(store.checksums(model.name, layer)) == NEURONS
                    assert store.placement(model.name, layer).tolist() == list(range(NEURONS))
                assert len(model.layers) == LAYERS
    except StoreError:
        pass


def flip_record(path: Path, key: bytes) -> None:
    """Flips one bit of the record's first byte in the file."""
    with Store.open(path).catalog._begun() as transaction:
        stored = bytes(transaction.get(key) or b"no such record")
    flip_bit(path / CATALOG_FILE, (path / CATALOG_FILE).read_bytes().index(stored))


@pytest.mark.parametrize("kind", [CHECKSUMS, PLACEMENT])
def test_a_flipped_bit_of_checksums_or_placement_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "store"
    write_model(path, layers=2, neurons=NEURONS)
    flip_record(path, array_key(kind, "tiny", 1))
    with Store.open(path) as opened, pytest.raises(CorruptionError, match=f"{kind}/tiny/00001 differs from its check"):
        verify_model(opened, "tiny")


def test_a_model_with_a_damaged_record_keeps_none_of_the_others_from_being_served(store: Path) -> None:
    flip_record(store, array_key(CHECKSUMS, "m2", 0))
    with serving(store, "--dram", "64MiB") as daemon:
        wanted = pb.FetchRequest(model="m3", bundles=pb.NeuronSet(layer=0, neurons=[5]))
        assert b"".join(part.data for part in daemon.stub.Fetch(wanted))
    assert "checksums/m2/00000 differs from its checksum" in daemon.log


def test_encodings_that_do_not_fit_together_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "store"
    record = write_model(path).record
    record.bundle.parts[0].encoding.block_values = 0
    with Store.open(path) as opened:
        opened.catalog.add(record, {})
    one_line(path, "the catalog is damaged: 'tiny': part 'gate' of 8 values in blocks of 0")


def test_a_store_of_format_1_is_read_and_added_to(tmp_path: Path) -> None:
    """Its records have no checksums."""
    with Store.open(tmp_path / "store", create=True) as opened, opened.catalog._begun(write=True) as transaction:
        transaction.put(META_KEY, b'{"magic": "weightd-store", "format_version": 1}')
    model = write_model(tmp_path / "store")
    with Store.open(tmp_path / "store") as opened:
        sums = [int(_native.checksum(np.ascontiguousarray(row))) for row in model.bundles[1]]
        assert opened.checksums("tiny", 1).tolist() == sums
        verify_model(opened, "tiny")
        stored = opened.catalog.array(CHECKSUMS, "tiny", 1)
        assert stored is not None
        assert len(stored) == 8 * len(sums)


# Room


def test_a_full_map_ends_the_import_with_one_line(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("weightd.store.catalog.MAP_BYTES", (store / CATALOG_FILE).stat().st_size)
    with pytest.raises(SpaceError, match="no space left for the catalog"):
        write_model(store, "large", layers=2, neurons=50_000, bundle_bytes=96)
    monkeypatch.undo()
    with Store.open(store) as opened:
        assert opened.names() == ["m0", "m2", "m3"]
        verify_model(opened, "m3")
    assert not [path.name for path in store.iterdir() if path.name.startswith((".import", ".removed", "large"))]
    assert main(["rm", "m3", "--store", str(store)]) == 0


def test_a_disk_that_is_full_at_the_catalogs_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the model are written, and another file takes the last block before the catalog is updated."""
    with small_disk(tmp_path, 60_000_000) as disk:
        write_model(disk / "store")
        add = "weightd.store.catalog.Catalog.add"
        original = Store.open(disk / "store").catalog.add.__func__  # type: ignore[attr-defined]

        def add_when_full(*arguments: object) -> None:
            fill(disk)
            original(*arguments)

        monkeypatch.setattr(add, add_when_full)
        with pytest.raises(SpaceError, match="no space"):
            write_model(disk / "store", "late", layers=2, neurons=50_000)
        monkeypatch.undo()
        (disk / "ballast").unlink()
        with Store.open(disk / "store") as opened:
            assert opened.names() == ["tiny"]
            verify_model(opened, "tiny")
        assert not (disk / "store" / "late").exists()
        write_model(disk / "store", "late", layers=2, neurons=50_000)


# Crashes


def test_temporary_folders_of_a_crash_are_gone_after_the_next_import(store: Path) -> None:
    """An import is killed while it writes, and a deletion half way."""
    killed = subprocess.run([sys.executable, "-c", KILLED, str(store)], cwd=FIXTURES, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with Store.open(store, readonly=True) as opened:
        set_aside(opened.path, store / "m3" / FILES_FOLDER)
    assert len([path for path in store.iterdir() if path.name.startswith(".")]) == 2
    write_model(store, "next")
    assert not [path for path in store.iterdir() if path.name.startswith(".")]


KILLED = """
import os, signal, sys
from pathlib import Path
from weightd.store.store import Store
staging = Store.open(sys.argv[1]).begin_import("half")
(staging.folder / "bundles.bin").write_bytes(bytes(100_000))
os.kill(os.getpid(), signal.SIGKILL)
"""
