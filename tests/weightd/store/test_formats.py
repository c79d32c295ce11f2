"""Stores of formats 1 and 2 are read as they are, and become format 3 with the next import.

tests/fixtures/stores holds one of each. Earlier versions of weightd made them from the same checkpoint of the family
llama in bfloat16, with a calibration of made-up files and a hotness.
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_checkpoint, make_config, make_model, stored_tensors
from repository import ROOT
from stored_model import read_state
from tiny_store import write_model
from transformers import AutoConfig

from flashclient.model.old_records import completed
from weightd.cli import main
from weightd.errors import CorruptionError, StoreError
from weightd.importing.convert import import_checkpoint
from weightd.store.catalog import FORMAT_VERSION, MODEL_PREFIX, Catalog
from weightd.store.store import RESIDENT_FILE, Store
from weightd.store.verify import verify_model
from weightd_proto.encodings import parts_of, plain
from weightd_proto.files import BUNDLES_FILE, CALIBRATION_FILES

LAYERS, HIDDEN, NEURONS = 2, 16, 40
FORMATS = [1, 2]


@pytest.fixture(params=FORMATS)
def old_store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    with tarfile.open(ROOT / "tests" / "fixtures" / "stores" / f"format_{request.param}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def format_of(folder: Path) -> int:
    with Store.open(folder) as store, store.catalog._transaction() as records:
        meta = records.meta()
    assert meta is not None
    return int(meta["format_version"])


def check_tiny(store: Store) -> None:
    """Compares every byte of the model, and every record."""
    record = store.model("tiny")
    assert list(record.bundle.parts) == parts_of(("gate", "up", "down"), plain("BF16"))
    assert record.compute_dtype == "BF16"
    assert [file.name for file in record.calibration.files] == list(CALIBRATION_FILES)
    hotness = store.hotness("tiny")
    assert hotness is not None
    assert hotness.tolist() == list(range(len(hotness)))
    verify_model(store, "tiny", allow_buffered=True)
    expected = stored_tensors(make_model(make_config("llama", LAYERS, HIDDEN, NEURONS), "bfloat16"))
    for name, tensor in read_state(store, "tiny").items():
        assert tensor.equal(expected[name]), name


def test_an_old_store_is_read_and_stays_as_it_is(old_store: Path) -> None:
    before = (old_store / "catalog.mdb").read_bytes()
    with Store.open(old_store) as store:
        check_tiny(store)
    assert main(["ls", "--store", str(old_store)]) == 0
    assert format_of(old_store) < FORMAT_VERSION
    assert (old_store / "catalog.mdb").read_bytes() == before


def test_an_import_makes_it_a_store_of_the_newest_format(old_store: Path) -> None:
    write_model(old_store, "new")
    assert format_of(old_store) == FORMAT_VERSION
    with Store.open(old_store) as store:
        check_tiny(store)
        verify_model(store, "new", allow_buffered=True)
        store.remove("tiny")
        assert store.names() == ["new"]


def test_what_else_writes_to_it_keeps_its_format(old_store: Path) -> None:
    old = format_of(old_store)
    with Store.open(old_store) as store:
        store.catalog.set_hotness("tiny", b"\1" * 4)
        store.catalog.set_device_profile("{}")
        assert store.hotness("tiny") is not None
    assert format_of(old_store) == old


def test_an_old_import_has_the_bytes_of_a_new_one(old_store: Path, tmp_path: Path) -> None:
    source = make_checkpoint(
        "llama", tmp_path / "llama", dtype="bfloat16", layers=LAYERS, hidden=HIDDEN, neurons=NEURONS
    )
    with Store.open(tmp_path / "new", create=True) as store:
        record = import_checkpoint(source, store, "tiny")
        with Store.open(old_store) as other:
            config = AutoConfig.from_pretrained(other.files_path("tiny"))
            old = completed(other.model("tiny"), config)  # what a client makes of it
        for name in (BUNDLES_FILE, RESIDENT_FILE):
            assert (tmp_path / "new" / "tiny" / name).read_bytes() == (old_store / "tiny" / name).read_bytes()
    assert record.bundle == old.bundle  # what clients and daemons of that time read is in it, too
    assert list(record.resident) == list(old.resident)
    assert list(record.layers) == list(old.layers)
    assert (record.model_class, record.activation) == (old.model_class, old.activation)


def test_a_damaged_record_stays_damaged_when_the_store_becomes_newer(old_store: Path) -> None:
    with Store.open(old_store) as store, store.catalog._begun(write=True) as transaction:
        record = bytearray(transaction.get(MODEL_PREFIX + b"tiny") or b"")
        record[2:6] = b"\xff\xff\xff\xff"
        transaction.put(MODEL_PREFIX + b"tiny", bytes(record))
    shutil.rmtree(old_store / "tiny")
    catalog = Catalog(old_store / "catalog.mdb")
    with pytest.raises(CorruptionError):
        catalog.model("tiny")
    write_model(old_store, "new")
    assert catalog.model("new") is not None
    with pytest.raises(CorruptionError):
        catalog.model("tiny")


def test_a_record_whose_dtype_is_unknown_is_damaged(tmp_path: Path) -> None:
    model = write_model(tmp_path / "store")
    model.record.bundle.ClearField("parts")
    model.record.bundle.old_dtype = "F24"
    with Store.open(tmp_path / "store") as store:
        store.catalog.add(model.record, {"tiny": {"placement": [np.zeros(1, "<u4")]}})
        with pytest.raises(StoreError, match=r"'tiny'.*bundles of dtype 'F24', known are F32, BF16, F16"):
            store.model("tiny")
