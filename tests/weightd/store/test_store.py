"""The store: what was written can be read, and everything else is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightd.errors import ImportingError, StoreError
from weightd.store.layout import bundle_layout, lay_out_layers
from weightd.store.staged_folder import MARKER_FILE
from weightd.store.store import Store
from weightd_proto import weightd_pb2
from weightd_proto.encodings import parts_of, plain


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", create=True)


def add_model(store: Store, name: str = "tiny", neurons: int = 5, layers: int = 2) -> list[np.ndarray]:
    """A record with random checksums and no weights."""
    layout = bundle_layout(parts_of(("up", "down"), plain("F32")), 8, 4096)
    records = [weightd_pb2.Layer(module=f"layers.{index}", neurons=neurons) for index in range(layers)]
    lay_out_layers(layout, records)
    checksums = [np.random.default_rng(index).integers(0, 1 << 63, neurons, np.uint64) for index in range(layers)]
    record = weightd_pb2.Model(name=name, compute_dtype="F32", bundle=layout, layers=records, import_id=b"1")
    with store.begin_import(name) as staging:
        (staging.folder / "bundles.bin").write_bytes(b"weights")
        staging.publish(record, checksums)
    return checksums


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(neurons=st.integers(1, 300), layers=st.integers(1, 5), number=st.integers(0, 10**9))
def test_what_is_published_is_read_back(store: Store, neurons: int, layers: int, number: int) -> None:
    name = f"model-{number}-{neurons}.{layers}"
    checksums = add_model(store, name, neurons, layers)
    reopened = Store.open(store.path, readonly=True)
    assert name in reopened.names()
    assert [layer.neurons for layer in reopened.model(name).layers] == [neurons] * layers
    for layer in range(layers):
        np.testing.assert_array_equal(reopened.checksums(name, layer), checksums[layer])
        np.testing.assert_array_equal(reopened.placement(name, layer), np.arange(neurons))
    reopened.remove(name)
    assert name not in store.names()
    assert not (store.path / name).exists()


def test_catalog_grows_past_its_first_pages(store: Store) -> None:
    checksums = add_model(store, "large", neurons=200_000, layers=4)
    add_model(store, "small")
    np.testing.assert_array_equal(store.checksums("large", 3), checksums[3])
    assert store.names() == ["large", "small"]


def test_published_folder_holds_the_files_alone(store: Store) -> None:
    add_model(store)
    assert sorted(path.name for path in store.path.iterdir()) == ["catalog.mdb", "catalog.mdb-lock", "tiny"]
    assert [path.name for path in (store.path / "tiny").iterdir()] == ["bundles.bin"]


def test_missing_store_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no store at .*weightd import SRC"):
        Store.open(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_folder_with_other_things_is_not_made_a_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StoreError, match=r"thesis\.tex"):
        Store.open(tmp_path, create=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", [b"not a database" * 1000, b""])
def test_file_that_is_no_catalog_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "catalog.mdb").write_bytes(content)
    with pytest.raises(StoreError, match="catalog"):
        Store.open(tmp_path, readonly=True)


def _put(store: Store, key: bytes, value: bytes) -> None:
    with lmdb.open(str(store.catalog.path), subdir=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(key, value)


def test_catalog_of_another_program_is_refused(store: Store) -> None:
    _put(store, b"meta", b'{"magic": "something-else"}')
    with pytest.raises(StoreError, match="not a weightd store"):
        Store.open(store.path)


def test_newer_format_is_refused_and_untouched(store: Store) -> None:
    add_model(store)
    _put(store, b"meta", json.dumps({"magic": "weightd-store", "format_version": 5}).encode())
    before = store.catalog.path.read_bytes()
    with pytest.raises(StoreError, match=r"store of format 5, this weightd knows up to 4: upgrade"):
        Store.open(store.path, create=True)
    assert store.catalog.path.read_bytes() == before


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "a b", "é", "a\n", "catalog.mdb", "x" * 201])
def test_names_that_are_no_plain_component_are_refused(store: Store, name: str) -> None:
    with pytest.raises(StoreError, match="not a model name"):
        store.begin_import(name)


def test_unknown_model_names_the_known(store: Store) -> None:
    add_model(store, "one")
    add_model(store, "two")
    with pytest.raises(StoreError, match=r"no model 'three' in .*: there is one, two"):
        store.model("three")
    with pytest.raises(StoreError, match="no model 'three'"):
        store.checksums("three", 0)
    with pytest.raises(StoreError, match="no checksums of layer 7"):
        store.checksums("one", 7)


def test_name_that_is_taken_is_refused_before_any_work(store: Store) -> None:
    checksums = add_model(store)
    with pytest.raises(StoreError, match=r"'tiny' is already in .*: rm it first, or import it as another --name"):
        store.begin_import("tiny")
    np.testing.assert_array_equal(store.checksums("tiny", 0), checksums[0])


def test_of_two_imports_of_one_name_the_second_is_refused_before_any_work(store: Store) -> None:
    with store.begin_import("tiny"):
        add_model(store, "other")
        with pytest.raises(ImportingError, match="another process imports 'tiny'"):
            store.begin_import("tiny")
    add_model(store)  # the first has failed
    assert sorted(path.name for path in store.path.iterdir()) == ["catalog.mdb", "catalog.mdb-lock", "other", "tiny"]


def test_an_interrupt_after_the_catalog_has_the_model_loses_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = store.catalog.add

    def interrupted(*arguments: Any) -> None:
        add(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(store.catalog, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add_model(store)
    assert store.names() == ["tiny"]
    assert [path.name for path in (store.path / "tiny").iterdir()] == ["bundles.bin"]


@pytest.mark.parametrize("what", ["nothing", "a file", "a link to nowhere", "a link to a folder"])
def test_what_was_put_in_the_place_of_a_model_is_removed_with_it(store: Store, tmp_path: Path, what: str) -> None:
    add_model(store)
    elsewhere = (store.path / "tiny").rename(tmp_path / "elsewhere")
    if what == "a file":
        (store.path / "tiny").touch()
    elif what != "nothing":
        (store.path / "tiny").symlink_to(elsewhere if what == "a link to a folder" else tmp_path / "nowhere")
    store.remove("tiny")
    assert sorted(path.name for path in store.path.iterdir()) == ["catalog.mdb", "catalog.mdb-lock"]
    assert (elsewhere / "bundles.bin").exists()
    add_model(store)


def test_what_is_in_the_way_of_an_import_is_named(store: Store) -> None:
    (store.path / "tiny").symlink_to("nowhere")
    with pytest.raises(StoreError, match="tiny is in the way and no model: move it, or import as another --name"):
        store.begin_import("tiny")


def test_an_import_is_replaced_by_a_new_one_and_by_no_other(store: Store) -> None:
    layout = bundle_layout(parts_of(("up", "down"), plain("F32")), 8, 4096)
    record = weightd_pb2.Model(name="tiny", compute_dtype="F32", bundle=layout, import_id=b"1")
    with store.begin_import("tiny") as staging:
        staging.publish(record, [])
    with pytest.raises(StoreError, match="already in"):
        store.begin_import("tiny", b"0")
    store.catalog.set_calibration("tiny", weightd_pb2.Calibration(version=3))
    with store.begin_import("tiny", b"1") as staging:
        (staging.folder / "bundles.bin").write_bytes(b"weights")
        record.import_id = b"2"
        staging.publish(record, [])
    assert store.model("tiny") == record
    assert [path.name for path in (store.path / "tiny").iterdir()] == ["bundles.bin"]
    assert sorted(path.name for path in store.path.iterdir()) == ["catalog.mdb", "catalog.mdb-lock", "tiny"]


def test_cleanings_side_by_side_fail_none(store: Store) -> None:
    def fail_and_clean(number: int) -> None:
        for round in range(20):
            with suppress(StopIteration), store.begin_import(f"tiny-{number}-{round}") as staging:
                (staging.folder / "bundles.bin").touch()
                raise StopIteration
            store.clean()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(fail_and_clean, range(4)))
    assert sorted(path.name for path in store.path.iterdir()) == ["catalog.mdb", "catalog.mdb-lock"]


def test_failed_import_leaves_nothing(store: Store) -> None:
    with store.begin_import("tiny") as staging:
        (staging.folder / "bundles.bin").touch()
    assert sorted(path.name for path in store.path.iterdir()) == ["catalog.mdb", "catalog.mdb-lock"]


def test_live_import_is_not_cleaned_and_a_dead_one_is(store: Store) -> None:
    with store.begin_import("live") as staging:
        dead = store.path / ".import-dead"
        dead.mkdir()
        (dead / MARKER_FILE).touch()
        (store.path / ".removed-dead").mkdir()
        Store.open(store.path).close()
        assert staging.folder.exists()
        assert not dead.exists()
        assert not (store.path / ".removed-dead").exists()


def test_folder_renamed_but_not_in_the_catalog_is_cleaned(store: Store) -> None:
    (store.path / "orphan").mkdir()
    (store.path / "orphan" / MARKER_FILE).touch()
    (store.path / "orphan" / "bundles.bin").touch()
    (store.path / "lost+found").mkdir()
    Store.open(store.path)
    assert not (store.path / "orphan").exists()
    assert (store.path / "lost+found").exists()


def test_marker_left_on_a_published_model_is_cleaned(store: Store) -> None:
    add_model(store)
    (store.path / "tiny" / MARKER_FILE).touch()
    Store.open(store.path)
    assert store.names() == ["tiny"]
    assert not (store.path / "tiny" / MARKER_FILE).exists()


def test_readonly_opening_cleans_nothing(store: Store) -> None:
    (store.path / ".import-dead").mkdir()
    Store.open(store.path, readonly=True)
    assert (store.path / ".import-dead").exists()


def test_second_daemon_is_refused_with_the_pid_of_the_first(store: Store) -> None:
    store.claim("unix:/run/weightd.sock")
    other = Store.open(store.path)
    assert other.served_by() == "unix:/run/weightd.sock"
    with pytest.raises(StoreError, match=rf"pid {os.getpid()} at unix:/run/weightd\.sock"):
        other.claim("unix:/run/other.sock")
    store.close()
    assert other.served_by() is None
    other.claim("unix:/run/other.sock")
    assert store.served_by() == "unix:/run/other.sock"
    other.close()


def test_claim_ends_with_its_process(store: Store) -> None:
    script = "import sys, weightd.store.store as s; store = s.Store.open(sys.argv[1])"
    script += "; store.claim('unix:x'); print('claimed'); sys.stdout.flush(); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(store.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"claimed\n"
        assert store.served_by() == "unix:x"
        with pytest.raises(StoreError, match=f"pid {child.pid}"):
            store.claim("unix:y")
        child.kill()
    assert store.served_by() is None


def test_rm_is_refused_while_a_daemon_serves(store: Store) -> None:
    add_model(store)
    daemon = Store.open(store.path)
    daemon.claim("unix:x")
    with pytest.raises(StoreError, match=r"a weightd at unix:x serves .*, stop it first"):
        store.remove("tiny")
    daemon.close()
    store.remove("tiny")
    assert store.names() == []


def test_rm_of_an_unknown_model_changes_nothing(store: Store) -> None:
    (store.path / "mine").mkdir()
    with pytest.raises(StoreError, match="no model 'mine'"):
        store.remove("mine")
    assert (store.path / "mine").exists()


def test_a_daemon_that_claims_the_store_during_rm_keeps_its_model(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_model(store)
    daemons = Store.open(store.path)
    lock = store.locked

    def claimed_just_before(shared: bool = False) -> AbstractContextManager[None]:
        if not shared:
            daemons.claim("unix:x")
        return lock(shared)

    monkeypatch.setattr(store, "locked", claimed_just_before)
    with pytest.raises(StoreError, match="unix:x"):
        store.remove("tiny")
    assert daemons.names() == ["tiny"]
    daemons.close()


def test_a_store_that_cannot_be_written_is_not_claimed(store: Store) -> None:
    (store.path / "weightd.lock").mkdir()  # has the effect of a read-only file system, for root too
    with pytest.raises(StoreError, match="make the store writable"):
        store.claim("unix:x")
