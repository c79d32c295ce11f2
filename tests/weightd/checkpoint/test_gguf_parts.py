"""GGUF files in parts, and folders with GGUF files: the one model is found, or the choice is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import make_config, make_model, write_gguf
from conftest import client_here

from flashclient import FlashClient
from weightd.checkpoint.opening import open_checkpoint
from weightd.cli import main
from weightd.disk.gguf_names import models_among, parts_of
from weightd.errors import CheckpointError
from weightd.importing.convert import import_checkpoint
from weightd.store.origin import origin_of
from weightd.store.store import Store, model_name_for

IDS = torch.tensor([[3, 4, 5, 6]])
FIRST, SECOND, THIRD = (f"m-0000{part}-of-00003.gguf" for part in (1, 2, 3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_gguf(make_model(make_config("llama")), folder / "m.gguf", part_tensors=9)
    assert sorted(path.name for path in folder.iterdir()) == [FIRST, SECOND, THIRD]
    return folder


@pytest.mark.parametrize("given", ["", FIRST])
def test_logits_are_those_of_the_model(given: str, whole: Path, tmp_path: Path) -> None:
    """By the first part, and by the folder."""
    with Store.open(tmp_path / "store", create=True) as store:
        import_checkpoint(whole / given, store, name="m")
    model = make_model(make_config("llama"))
    with FlashClient("m", store=tmp_path / "store") as client, torch.no_grad():
        torch.testing.assert_close(client.model(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folder", ["", "Q4_K_M"])
def test_parts_in_a_snapshot_of_the_cache(folder: str, whole: Path, tmp_path: Path) -> None:
    """Of repositories that have a folder for each quantisation, too."""
    repository = tmp_path / "models--a--b"
    shutil.copytree(whole, repository / "blobs")
    snapshot = repository / "snapshots" / "0123"
    (snapshot / folder).mkdir(parents=True)
    for number, part in enumerate((FIRST, SECOND, THIRD)):
        (repository / "blobs" / part).rename(repository / "blobs" / str(number))
        (snapshot / folder / part).symlink_to(Path("../" * (3 if folder else 2), "blobs", str(number)))
    assert len(open_checkpoint(snapshot / folder / FIRST).tensors) > 9
    outside = tmp_path / "outside.gguf"
    (repository / "blobs" / "1").rename(outside)
    (snapshot / folder / SECOND).unlink()
    (snapshot / folder / SECOND).symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        open_checkpoint(snapshot / folder / FIRST)


SUM = "ab" * 31  # and two digits


@pytest.mark.parametrize("given", ["", FIRST])
def test_a_copy_of_a_snapshot_whose_links_lead_into_the_cache(given: str, whole: Path, tmp_path: Path) -> None:
    blobs, copy = tmp_path / "hub" / "models--a--b" / "blobs", tmp_path / "copy"
    shutil.copytree(whole, blobs)
    copy.mkdir()
    for number, part in enumerate((FIRST, SECOND, THIRD)):
        (blobs / part).rename(blobs / f"{SUM}0{number}")
        (copy / part).symlink_to(blobs / f"{SUM}0{number}")
    assert len(open_checkpoint(copy / given).tensors) > 18
    (copy / SECOND).unlink()
    (blobs / f"{SUM}01").rename(blobs / "secret")  # a name that is no checksum of what the file holds
    (copy / SECOND).symlink_to(blobs / "secret")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        open_checkpoint(copy)


def test_a_first_part_that_is_named_may_be_a_link_to_where_the_others_lie(whole: Path, tmp_path: Path) -> None:
    for part in (FIRST, SECOND, THIRD):
        (tmp_path / part).symlink_to(whole / part)
    assert len(open_checkpoint(tmp_path / FIRST).tensors) > 18
    with pytest.raises(CheckpointError, match=f"{FIRST} is a link out of its folder"):
        open_checkpoint(tmp_path)  # nobody has named it


def test_the_name_has_no_number_of_a_part_and_each_part_may_change(whole: Path) -> None:
    assert model_name_for(whole / FIRST) == "m"
    assert [file.name for file in origin_of(whole / FIRST, "keep").files] == [FIRST, SECOND, THIRD]


def rename(folder: Path) -> None:
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"{number}.gguf")


def swap(folder: Path) -> None:
    (folder / SECOND).rename(folder / "x")
    (folder / THIRD).rename(folder / SECOND)
    (folder / "x").rename(folder / THIRD)


def lead_out(folder: Path) -> None:
    outside = folder.parent / "outside.gguf"
    (folder / SECOND).rename(outside)
    (folder / SECOND).symlink_to(outside)


@pytest.mark.parametrize(
    ("spoil", "given", "message"),
    [
        (lambda _: None, SECOND, rf"is one of 3 parts: give the first, {FIRST}$"),
        (lambda folder: (folder / THIRD).unlink(), FIRST, rf"1 of the 3 parts of .* are missing, first {THIRD}: downl"),
        (rename, "0.gguf", r"is one of 3 parts, whose names end in -00001-of-00003\.gguf and so on: rename them"),
        (swap, FIRST, rf"{SECOND} says that it is part 3 of 3, and its name that it is 2 of 3: download"),
        (lead_out, FIRST, rf"{SECOND} is a link out of its folder"),
        (lambda folder: (folder / SECOND).write_bytes(b"GGUF"), FIRST, rf"{SECOND} is incomplete: its header ends"),
        (
            lambda folder: (folder / "other.gguf").touch(),
            "",
            rf"holds 2 models in \.gguf files: give one of {FIRST}",
        ),
    ],
)
def test_what_is_no_whole_model_is_refused(
    spoil: Callable[[Path], object], given: str, message: str, whole: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole, tmp_path / "m")
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder / given)
    assert "\n" not in str(caught.value)


def test_a_projector_beside_a_model_is_no_choice() -> None:
    names = ["b-00002-of-00002.gguf", "b-00001-of-00002.gguf", "mmproj-b.gguf", "x/mmproj.gguf", "README.md"]
    assert models_among(names) == ["b-00001-of-00002.gguf"]
    assert parts_of("x/b-00001-of-00002.gguf") == ["x/b-00001-of-00002.gguf", "x/b-00002-of-00002.gguf"]


@pytest.mark.parametrize("name", ["", "model"])
def test_plans_take_what_an_import_takes(
    name: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with a GGUF model, and a file without the suffix."""
    monkeypatch.setattr("weightd.planning.plan.child", client_here)
    folder = shutil.copytree(whole, tmp_path / "m")
    if name:
        for path in folder.iterdir():
            path.unlink()
        write_gguf(make_model(make_config("llama")), folder / "m.gguf").rename(folder / name)
    assert main(["plan", str(folder / name), "--json", "--device", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == (name or "m")
