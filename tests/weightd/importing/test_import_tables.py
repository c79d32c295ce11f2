"""Imports with tables: what becomes one, what is stored, and that nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import lmdb
import pytest
import torch
from checkpoints import make_checkpoint, make_config, make_model, write_gguf
from safetensors.numpy import load_file
from stored_model import read_bundles

from flashclient import FlashClient
from weightd import cli
from weightd.errors import CheckpointError, CorruptionError, StoreError
from weightd.importing.convert import import_checkpoint
from weightd.importing.update import KEPT, REPLACED, update
from weightd.store.store import Store
from weightd.store.verify import verify_model
from weightd_proto.encodings import check

TABLE = "model.embed_tokens"
ROWS, HIDDEN = 320, 64


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", create=True)


def keys(store: Store) -> list[str]:
    with lmdb.open(str(store.catalog.path), subdir=False, readonly=True) as environment, environment.begin() as records:
        return [bytes(key).decode() for key in records.cursor().iternext(values=False)]


def test_rows_are_stored_as_they_are_in_the_checkpoint(store: Store, untied: Path) -> None:
    model = import_checkpoint(untied, store, "m", tables_above_bytes=0)
    (table,) = store.model("m").tables
    assert (table.name, table.import_id) == (f"m/{TABLE}", model.import_id)
    weight = load_file(untied / "model.safetensors")[f"{TABLE}.weight"]
    assert [row.tobytes() for row in read_bundles(store, table, 0)] == [row.tobytes() for row in weight]
    assert f"{TABLE}.weight" not in {tensor.name for tensor in model.resident}


def test_only_what_is_larger_becomes_a_table(store: Store, untied: Path) -> None:
    size_bytes = ROWS * HIDDEN * 4
    assert not import_checkpoint(untied, store, "default").tables
    assert not import_checkpoint(untied, store, "as-large", tables_above_bytes=size_bytes).tables
    assert import_checkpoint(untied, store, "larger", tables_above_bytes=size_bytes - 1).tables
    assert not import_checkpoint(untied, store, "narrow", dtype="bf16", tables_above_bytes=size_bytes // 2).tables


def test_a_tied_embedding_stays_resident(store: Store, tmp_path: Path) -> None:
    tied = make_checkpoint("llama", tmp_path / "tied", tie_word_embeddings=True)
    assert not import_checkpoint(tied, store, "tied", tables_above_bytes=0).tables


def test_verify_finds_a_damaged_row_and_a_missing_file(store: Store, untied: Path) -> None:
    import_checkpoint(untied, store, "m", tables_above_bytes=0)
    assert verify_model(store, "m").rows == ROWS
    path = store.path / "m" / TABLE / "bundles.bin"
    data = bytearray(path.read_bytes())
    data[2 * 256] ^= 1  # 256 bytes each
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match=f"model m, table {TABLE}, row 2: it differs from its checksum"):
        verify_model(store, "m")
    path.unlink()
    with pytest.raises(CorruptionError, match=r"bundles\.bin is missing"):
        verify_model(store, "m")


def test_rm_leaves_nothing_of_the_tables(store: Store, untied: Path) -> None:
    before = keys(store)
    import_checkpoint(untied, store, "m", tables_above_bytes=0)
    store.catalog.set_hotness(f"m/{TABLE}", b"\1" * 20)
    with pytest.raises(StoreError, match="no model"):
        store.remove(f"m/{TABLE}")
    store.remove("m")
    assert keys(store) == before
    assert not (store.path / "m").exists()


def test_an_import_that_ends_while_it_writes_a_table_leaves_nothing(store: Store, untied: Path) -> None:
    before, files = keys(store), sorted(store.path.iterdir())
    rows = []

    def interrupt(read_bytes: int, total_bytes: int) -> None:
        if any(store.path.glob(f".import-*/{TABLE}")):
            rows.append(read_bytes)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(untied, store, "m", progress=interrupt, tables_above_bytes=0)
    assert rows
    assert keys(store) == before
    assert sorted(store.path.iterdir()) == files


def test_progress_counts_the_tables(store: Store, untied: Path) -> None:
    calls: list[tuple[int, int]] = []
    import_checkpoint(untied, store, "m", progress=lambda *call: calls.append(call), tables_above_bytes=0)
    assert {total for _, total in calls} == {sum(read for read, _ in calls)}


def test_update_keeps_what_was_asked_for_until_it_is_asked_for_something_else(store: Store, untied: Path) -> None:
    import_checkpoint(untied, store, "m", tables_above_bytes=0)
    assert update(untied, store, "m")[1] == KEPT
    model, done = update(untied, store, "m", tables_above_bytes=1 << 30)
    assert (done, list(model.tables)) == (REPLACED, [])
    assert update(untied, store, "m")[1] == KEPT


def test_the_commands_show_tables(tmp_path: Path, untied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--store", str(tmp_path / "store")]
    assert cli.main(["import", str(untied), *where, "--name", "m", "--tables-above", "1KiB"]) == 0
    assert "tables 80KiB, resident" in capsys.readouterr().out
    assert cli.main(["ls", *where, "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["tables"] == [{"module": TABLE, "rows": ROWS, "row_bytes": 256, "bytes": 80 << 10}]
    assert cli.main(["verify", *where]) == 0
    assert f" {ROWS} rows," in capsys.readouterr().out
    assert cli.main(["import", str(untied), *where, "--tables-above", "much"]) == 2
    assert "--tables-above: not a size: 'much'" in capsys.readouterr().err


def kind_of(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType["Q4_0" if name.startswith(("token_embd", "blk.0.ffn")) else "F32"]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantised") / "model.gguf"
    write_gguf(make_model(make_config("llama", neurons=192, tie_word_embeddings=False)), path, kind_of)
    return path


def test_blocks_of_a_table_are_kept_and_give_the_values_of_resident_ones(store: Store, quantised: Path) -> None:
    resident = import_checkpoint(quantised, store, "resident")
    (table,) = import_checkpoint(quantised, store, "tables", tables_above_bytes=0).tables
    check(store.model("tables"))
    (published,) = [one for one in gguf.GGUFReader(quantised).tensors if one.name == "token_embd.weight"]
    assert table.bundle.parts[0].encoding.format == "Q4_0"
    assert [row.tobytes() for row in read_bundles(store, table, 0)] == [row.tobytes() for row in published.data]
    assert {tensor.name: tensor.dtype for tensor in resident.resident}[f"{TABLE}.weight"] == "Q4_0"
    assert verify_model(store, "tables").rows == ROWS
    logits = []
    for name in ("resident", "tables"):
        with FlashClient(name, store=store.path, mode="exact") as client, torch.no_grad():
            logits.append(client.model(torch.arange(3, 63).view(2, 30)).logits)
    assert torch.equal(*logits)
    (plain,) = import_checkpoint(quantised, store, "plain", tables_above_bytes=0, resident_request="plain").tables
    assert plain.bundle.parts[0].encoding.format == "F32"
    size_bytes = len(published.data.tobytes())
    assert not import_checkpoint(quantised, store, "small", tables_above_bytes=size_bytes).tables


def test_a_damaged_scale_of_a_table_is_refused_with_its_row(store: Store, quantised: Path, tmp_path: Path) -> None:
    (published,) = [one for one in gguf.GGUFReader(quantised).tensors if one.name == "token_embd.weight"]
    row_bytes = published.data.shape[1]
    damaged = tmp_path / "damaged.gguf"
    content = bytearray(quantised.read_bytes())
    at = int(published.data_offset) + 7 * row_bytes
    content[at : at + 2] = b"\xff\x7f"
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"token_embd.weight in .* Q4_0 whose scale is NaN or infinite, in row 7"):
        import_checkpoint(damaged, store, "damaged", tables_above_bytes=0)
    assert store.models() == []
