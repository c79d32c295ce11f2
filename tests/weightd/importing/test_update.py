"""A checkpoint is imported once, and again when it has changed. Of several processes one imports it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import seccomp
from checkpoints import make_checkpoint
from seccomp import ALLOW, FAIL, JUMP_EQUAL, LOAD_WORD, NUMBER_OFFSET_BYTES, RETURN

from weightd.cli import main
from weightd.errors import StoreError
from weightd.importing.update import IMPORTED, KEPT, REPLACED, update
from weightd.store.origin import origin_of
from weightd.store.store import Store, check_model_name, model_name_for
from weightd_proto import weightd_pb2 as pb

FALLOCATE = 285  # on x86-64


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint("opt", tmp_path / "m", layers=1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", create=True)


def rewrite(path: Path, change: Callable[[bytearray], object], keep_time: bool = False) -> None:
    facts = path.stat()
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def flip_last(data: bytearray) -> None:
    data[-1] ^= 0x10


def test_every_spelling_of_a_path_is_one_model(
    checkpoint: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latest").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    spellings = [Path("./m"), Path("m/"), checkpoint, Path("latest"), Path("m/../m"), Path("./latest/")]
    done = [update(path, store) for path in spellings]
    assert [(model.name, what) for model, what in done] == [("m", IMPORTED)] + [("m", KEPT)] * 5
    assert store.names() == ["m"]


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte of the weights": lambda folder: rewrite(folder / "model.safetensors", flip_last),
    "a byte, and the time set back": lambda folder: rewrite(folder / "model.safetensors", flip_last, keep_time=True),
    "the configuration": lambda folder: rewrite(folder / "config.json", lambda data: data.extend(b" ")),
    "a file more": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_imported_again_and_nothing_else(checkpoint: Path, store: Store, change: str) -> None:
    before, _ = update(checkpoint, store)
    (checkpoint / "README.md").write_text("no part of the model")
    assert update(checkpoint, store)[1] == KEPT
    CHANGES[change](checkpoint)
    after, done = update(checkpoint, store)
    assert (done, store.names()) == (REPLACED, ["m"])
    assert store.model("m").import_id == after.import_id != before.import_id
    assert main(["verify", "--store", str(store.path)]) == 0


def test_a_changed_checkpoint_keeps_name_and_dtype(checkpoint: Path, store: Store) -> None:
    update(checkpoint, store, "mine", "bf16")
    CHANGES["a byte of the weights"](checkpoint)
    model, done = update(checkpoint, store)
    assert (model.name, model.compute_dtype, done) == ("mine", "BF16", REPLACED)
    assert update(checkpoint, store, dtype="fp32")[1] == REPLACED


def test_the_activation_that_an_import_was_told_is_kept(checkpoint: Path, store: Store) -> None:
    assert update(checkpoint, store)[1] == IMPORTED
    assert update(checkpoint, store, activation="relu")[1] == REPLACED
    assert update(checkpoint, store)[1] == KEPT
    assert update(checkpoint, store, activation="relu")[1] == KEPT


def test_what_would_be_lost_is_refused(checkpoint: Path, store: Store, tmp_path: Path) -> None:
    update(checkpoint, store)
    CHANGES["a byte of the weights"](checkpoint)
    store.catalog.set_calibration("m", pb.Calibration(version=1))
    with pytest.raises(StoreError, match="would delete its calibration"):
        update(checkpoint, store)
    with pytest.raises(StoreError, match=r"has a model 'm' already, imported from .*/m, not from .*/elsewhere/m"):
        update(make_checkpoint("opt", tmp_path / "elsewhere" / "m", layers=1), store)


def test_an_import_by_an_older_weightd_is_taken_as_it_is(checkpoint: Path, store: Store) -> None:
    update(checkpoint, store)
    record = store.model("m")
    record.ClearField("origin")
    store.catalog.add(record, {})
    CHANGES["a byte of the weights"](checkpoint)
    assert update(checkpoint, store)[1] == KEPT


def test_of_many_at_once_one_imports_and_the_others_wait(
    checkpoint: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = threading.Barrier(4, timeout=60)
    await_import = Store.await_import

    def awaited(self: Store, name: str) -> None:
        waiting.wait()
        await_import(self, name)

    done: list[str] = []
    threads = [threading.Thread(target=lambda: done.append(update(checkpoint, store)[1])) for _ in range(3)]
    with store.begin_import("m"):
        monkeypatch.setattr(Store, "await_import", awaited)
        for thread in threads:
            thread.start()
        waiting.wait()  # all three were refused and wait; this import fails
        monkeypatch.setattr(Store, "await_import", await_import)
    for thread in threads:
        thread.join()
    assert sorted(done) == [IMPORTED, KEPT, KEPT]


def test_the_command_says_what_it_did(checkpoint: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["import", str(checkpoint), "--store", str(store.path), "--update"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["done"] == "imported"
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("kept m: opt")


@pytest.mark.parametrize("name", ["a b", "#?%,", "modèle", "two\nlines", ".hidden", "-x", "x" * 250, "", "catalog.mdb"])
def test_any_folder_has_a_name_in_a_store(name: str) -> None:
    assert check_model_name(model_name_for(Path(name)))


def test_the_record_of_a_file_can_be_read_whatever_its_name(tmp_path: Path) -> None:
    file = tmp_path / "köpfe \udcff.gguf"
    file.write_bytes(b"x" * 10)
    (recorded,) = origin_of(file, "keep").files
    assert (recorded.name, recorded.size_bytes) == ("köpfe \\xff.gguf", 10)


@pytest.mark.parametrize("reason", [95, 38, 1, 13])  # EOPNOTSUPP, ENOSYS, EPERM, EACCES
def test_no_fallocate_is_no_fault(checkpoint: Path, tmp_path: Path, reason: int) -> None:
    program = [
        (LOAD_WORD, 0, 0, NUMBER_OFFSET_BYTES),
        (JUMP_EQUAL, 0, 1, FALLOCATE),
        (RETURN, 0, 0, FAIL | reason),
        (RETURN, 0, 0, ALLOW),
    ]
    # In a process of its own: gRPC's threads do not survive a fork of this one.
    filtered = f"import sys; sys.path.insert(0, {str(Path(seccomp.__file__).parent)!r}); import seccomp; "
    filtered += f"seccomp.install({program!r}); from weightd.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", filtered, "import", str(checkpoint), "--store", str(tmp_path / "filtered")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_a_folder_that_is_closed_to_us_is_left_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = store.path / "lost+found"
    closed.mkdir()
    real = Path.exists

    def exists(path: Path) -> bool:
        if path.parent == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "exists", exists)
    store.clean()
    assert closed.is_dir()
