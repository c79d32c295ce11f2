"""One named test per fault of an import: kills, a full disk, bad checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from conftest import answer_here
from repository import FIXTURES
from small_disk import fill, small_disk

from weightd.checkpoint.opening import open_checkpoint
from weightd.cli import main
from weightd.errors import CheckpointError
from weightd.importing.client_process import derive
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store
from weightd.store.verify import verify_model

DYING = FIXTURES / "dying_process.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint("llama", tmp_path_factory.mktemp("checkpoint") / "tiny")
    recipe = derive(open_checkpoint(path), answer_here)
    path.with_name("tiny.recipe").write_bytes(recipe.SerializeToString())  # for dying_process.py
    return path


@pytest.fixture
def store(tmp_path: Path, checkpoint: Path) -> Path:
    """A store with one model in it, `old`."""
    path = tmp_path / "store"
    assert main(["import", str(checkpoint), "--store", str(path), "--name", "old"]) == 0
    return path


def die(point: str, *arguments: str | Path) -> None:
    command = [sys.executable, str(DYING), point, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode in (-signal.SIGKILL, -signal.SIGSYS), result.stderr


def assert_whole(path: Path, names: list[str]) -> None:
    """Asserts that the store has these models, with every byte right, and nothing else in its folder."""
    with Store.open(path) as store:
        assert store.names() == names
        for name in names:
            verify_model(store, name)
    assert {entry.name for entry in path.iterdir()} == {*names, "catalog.mdb", "catalog.mdb-lock"}


# Kills

BEFORE_COMMIT = (
    "after mkdir .import-*",
    "after open .unpublished",
    "after mkdir hf",
    "before fsync tokenizer.json",
    "after fsync tokenizer_config.json",
    "after open bundles.bin",
    "after posix_fallocate bundles.bin",
    "after posix_fallocate resident.safetensors",
    "after pwritev bundles.bin",
    "before pwritev resident.safetensors",
    "after pwritev resident.safetensors",
    "after ftruncate resident.safetensors",
    "before fsync bundles.bin",
    "after fsync bundles.bin",
    "after fsync hf",
    "before rename .import-*",
    "after rename .import-*",
    "after fsync store",
    "put checksums/new/0",
    "put placement/new/1",
    "fdatasync",
    "write of the meta page",
)
AFTER_COMMIT = ("before unlink .unpublished", "after unlink .unpublished")


@pytest.mark.parametrize("point", BEFORE_COMMIT)
def test_killed_import_leaves_the_old_catalog_and_the_next_succeeds(store: Path, checkpoint: Path, point: str) -> None:
    die(point, "import", store, checkpoint, "new")
    with Store.open(store, readonly=True) as catalog:
        assert catalog.names() == ["old"]
        verify_model(catalog, "old")
    assert main(["import", str(checkpoint), "--store", str(store), "--name", "new"]) == 0
    assert_whole(store, ["new", "old"])


@pytest.mark.parametrize("point", BEFORE_COMMIT[:1] + BEFORE_COMMIT[-6:])
def test_leftovers_are_cleaned_by_an_import_of_another_name(store: Path, checkpoint: Path, point: str) -> None:
    die(point, "import", store, checkpoint, "new")
    assert main(["import", str(checkpoint), "--store", str(store), "--name", "other"]) == 0
    assert_whole(store, ["old", "other"])


@pytest.mark.parametrize("point", AFTER_COMMIT)
def test_import_killed_after_its_commit_is_there(store: Path, checkpoint: Path, point: str) -> None:
    die(point, "import", store, checkpoint, "new")
    assert_whole(store, ["new", "old"])


@pytest.mark.parametrize("point", ["after mkdir store", "fdatasync", "write of the meta page"])
def test_store_whose_making_was_killed_is_made_by_the_next(tmp_path: Path, checkpoint: Path, point: str) -> None:
    die(point, "import", tmp_path / "store", checkpoint, "new")
    assert main(["import", str(checkpoint), "--store", str(tmp_path / "store"), "--name", "new"]) == 0
    assert_whole(tmp_path / "store", ["new"])


@pytest.mark.parametrize(
    ("point", "names"),
    [
        ("after open .unpublished", ["old"]),
        ("put checksums/old/0", ["old"]),
        ("fdatasync", ["old"]),
        ("write of the meta page", ["old"]),
        ("before rename old", []),
        ("after rename old", []),
        ("after unlink bundles.bin", []),
        ("before rmdir .removed-*", []),
    ],
)
def test_killed_rm_removes_all_or_nothing(store: Path, point: str, names: list[str]) -> None:
    die(point, "rm", store, "old")
    assert_whole(store, names)


# A full disk


def test_file_size_limit_ends_the_import_with_one_line(store: Path, checkpoint: Path) -> None:
    limited = ["sh", "-c", 'trap "" XFSZ; ulimit -f 390; exec "$@"', "sh"]  # blocks of 512 bytes
    command = [*limited, sys.executable, "-m", "weightd.cli", "import", str(checkpoint), "--store", str(store)]
    result = subprocess.run([*command, "--name", "new"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(f"weightd: no space in {store}: ")
    assert result.stderr.count("\n") == 1
    assert_whole(store, ["old"])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path, 150_000_000) as mounted:
        yield mounted


def test_full_disk_is_refused_with_the_numbers(
    disk: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(checkpoint), "--store", str(disk), "--name", "first"]) == 0
    fill(disk, shutil.disk_usage(disk).free - 200_000)
    capsys.readouterr()
    assert main(["import", str(checkpoint), "--store", str(disk), "--name", "second"]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"weightd: second needs \S+KiB in \S+, but \S+KiB are free: make room\S*\n", error), error
    (disk / "ballast").unlink()
    assert_whole_on_disk(disk, ["first"])


def assert_whole_on_disk(path: Path, names: list[str]) -> None:
    with Store.open(path) as store:
        assert store.names() == names
        for name in names:
            verify_model(store, name)


def test_disk_that_fills_up_meanwhile_ends_the_import(
    disk: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was enough space when it was checked, then other files took it."""
    Store.open(disk, create=True).close()
    free_bytes = shutil.disk_usage(disk).free
    fill(disk, free_bytes - 200_000)
    monkeypatch.setattr("weightd.importing.convert._check_space", lambda _record, _path: None)
    assert main(["import", str(checkpoint), "--store", str(disk)]) == 1
    assert "no space in" in capsys.readouterr().err
    (disk / "ballast").unlink()
    assert_whole_on_disk(disk, [])


# Bad checkpoints


@pytest.mark.parametrize("made", [(), ("outer",), ("outer", "inner")])
def test_a_refused_import_leaves_no_empty_store(tmp_path: Path, made: tuple[str, ...]) -> None:
    source = make_checkpoint("llama", tmp_path / "bad")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"hidden_act": "no such"}))
    tmp_path.joinpath(*made).mkdir(parents=True, exist_ok=True)
    assert main(["import", str(source), "--store", str(tmp_path / "outer" / "inner")]) == 1
    there = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if source not in (path, *path.parents)]
    assert there == [Path(*made[: count + 1]) for count in range(len(made))]


def test_a_store_that_another_refused_import_removes_is_made_again(tmp_path: Path) -> None:
    source, path = make_checkpoint("llama", tmp_path / "tiny"), tmp_path / "store"
    with Store.made(path) as store:
        with pytest.raises(KeyError), Store.made(path):
            raise KeyError
        assert path.exists()  # it was not new to the second
        store._unmake([path])
        assert not path.exists()
        import_checkpoint(source, store)
    assert_whole(path, ["tiny"])


def rewrite(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"1234")


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def write_others(folder: Path) -> None:
    """As whoever trains, logs or downloads more may do."""
    (folder / "log.txt").write_text("begun")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "generation_config.json").unlink()


@pytest.mark.parametrize(("change", "refused"), [(rewrite, True), (remove, True), (write_others, False)])
def test_a_checkpoint_that_changes_while_it_is_read(
    store: Path, checkpoint: Path, tmp_path: Path, change: Callable[[Path], None], refused: bool
) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    changes = iter([change])

    def progress(*_: int) -> None:
        if (now := next(changes, None)) is not None:
            now(source)

    match = "changed during the import, first model.safetensors: "
    expected = pytest.raises(CheckpointError, match=match) if refused else nullcontext()
    with Store.open(store) as opened, expected:
        import_checkpoint(source, opened, "new", progress=progress, ask=answer_here)
    assert next(changes, None) is None
    assert_whole(store, ["old"] if refused else ["new", "old"])


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lose_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def bad_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"{{{{")


Damage = Callable[[Path], None]
BAD: dict[str, tuple[str, Damage, str]] = {
    "half_downloaded_safetensors": ("safetensors", lambda f: truncate(f / "model.safetensors"), "is incomplete: "),
    "header_cut_off": ("safetensors", lambda f: os.truncate(f / "model.safetensors", 100), "its header alone takes"),
    "empty_safetensors": ("safetensors", lambda f: os.truncate(f / "model.safetensors", 0), "is not a safetensors"),
    "header_that_is_no_json": ("safetensors", bad_header, "is not a safetensors file"),
    "half_downloaded_bin": ("bin", lambda f: truncate(f / "pytorch_model.bin"), "is incomplete or of torch's format"),
    "missing_shard": ("safetensors-sharded", lose_shard, "shards are missing in"),
    "no_weights": ("safetensors", lambda f: (f / "model.safetensors").unlink(), "no weights in"),
    "no_config": ("safetensors", lambda f: (f / "config.json").unlink(), r"no config\.json in"),
    "half_a_config": ("safetensors", lambda f: truncate(f / "config.json"), "is not JSON"),
    "unknown_architecture": (
        "safetensors",
        lambda f: change_config(f, model_type="unheard_of"),
        "unknown model type 'unheard_of'",
    ),
    "wrong_shape": ("safetensors", lambda f: change_config(f, intermediate_size=200), r"has shape \[\d+, \d+\] in"),
    "quantised": (
        "safetensors",
        lambda f: change_config(f, quantization_config={"quant_method": "hqq"}),
        r"is quantised \(hqq\): import the unquantised",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_checkpoint(
    tmp_path: Path, store: Path, fault: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    format, damage, message = BAD[fault]
    folder = make_checkpoint("llama", tmp_path / "bad", format=format)
    damage(folder)
    assert_refused(folder, store, message, capsys)


def assert_refused(source: Path, store: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Asserts exit status 1, one clear line, and an unchanged store."""
    import re

    capsys.readouterr()
    assert main(["import", str(source), "--store", str(store)]) == 1
    error = capsys.readouterr().err
    assert re.match(f"weightd: .*{message}", error), error
    assert error.count("\n") == 1
    assert_whole(store, ["old"])


def test_checkpoint_that_is_not_there(tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(tmp_path / "none", store, "no checkpoint at ", capsys)


GGUF_HEADERS: dict[str, tuple[bytes, str]] = {
    "not_gguf": (b"GGML" + bytes(100), "is not a GGUF file"),
    "other_version": (struct.pack("<4sIQQ", b"GGUF", 9, 0, 0), "has GGUF version 9"),
    "header_cut_off": (struct.pack("<4sIQQ", b"GGUF", 3, 5, 5), "is incomplete: its header ends early"),
    "no_architecture": (struct.pack("<4sIQQ", b"GGUF", 3, 0, 0), "does not say its architecture"),
}


@pytest.mark.parametrize("fault", GGUF_HEADERS)
def test_bad_gguf_header(tmp_path: Path, store: Path, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = GGUF_HEADERS[fault]
    (tmp_path / "bad.gguf").write_bytes(content)
    assert_refused(tmp_path / "bad.gguf", store, message, capsys)


def test_half_downloaded_gguf(tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_checkpoint("qwen2", tmp_path / "model", format="gguf")
    truncate(path)
    assert_refused(path, store, "is incomplete: ", capsys)


def test_unknown_gguf_architecture(tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "bad.gguf", "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    message = "unknown GGUF architecture 'rwkv7': known are arcee, bloom, ernie4_5, falcon, gemma, gemma2,"
    assert_refused(tmp_path / "bad.gguf", store, message, capsys)


def test_torch_files_of_other_layouts(tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    folder = make_checkpoint("llama", tmp_path / "model", format="bin")
    file = folder / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    torch.save(state | {"model.norm.weight": torch.zeros(128)[::2]}, file)
    assert_refused(folder, store, "as a strided view: save it again", capsys)
    torch.save(state | {3: torch.zeros(1)}, file)
    assert_refused(folder, store, "holds a tensor under 3, which is no name of a tensor", capsys)
    torch.save(state, file, _use_new_zipfile_serialization=False)
    assert_refused(folder, store, r"is incomplete or of torch's format before 1\.6", capsys)
    torch.save({"model.norm.weight": Path}, file)
    assert_refused(folder, store, r"holds code \(pathlib\.Path\) beside its weights, which is never run", capsys)


def test_code_in_a_torch_file_is_not_run(tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import os

    import torch

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    folder = make_checkpoint("llama", tmp_path / "model", format="bin")
    torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model.bin")
    assert_refused(folder, store, r"holds code \(posix\.mkdir\) beside its weights", capsys)
    assert not (tmp_path / "sprung").exists()


def test_download_that_is_not_finished_is_called_so(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `hf download --local-dir` leaves it."""
    folder = make_checkpoint("llama", tmp_path / "model")
    downloads = folder / ".cache" / "huggingface" / "download"
    downloads.mkdir(parents=True)
    (folder / "model.safetensors").rename(downloads / "x.0123.incomplete")
    message = r"no weights in .*; 1 unfinished files \(\*\.incomplete\) lie there: run the download again"
    assert_refused(folder, store, message, capsys)
