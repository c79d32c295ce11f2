"""Models of the hub: from a server on this machine that speaks the hub's protocol, and from the hub's cache."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from hub_server import HubServer
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from weightd.checkpoint.hub import fetch
from weightd.checkpoint.opening import locate, open_checkpoint
from weightd.errors import CheckpointError, SpaceError, WeightdError
from weightd.store.origin import source_text
from weightd.store.store import model_name_for
from weightd_proto.hub_names import is_hub_name

NAME = "org/tiny"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = make_checkpoint("llama", tmp_path / "published", layers=1, hidden=32, neurons=48)
    (folder / "README.md").write_text("not for an import")
    (folder / "flax_model.msgpack").write_bytes(b"another format")
    return folder


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer(published, NAME)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    with server.running():
        yield server


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def shard(folder: Path) -> None:
    """Makes two shards of the weights, with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    weight_map = {name: f"model-0000{1 + (name in names[::2])}-of-00002.safetensors" for name in names}
    for file in set(weight_map.values()):
        save_file({name: state[name] for name in names if weight_map[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_model_is_downloaded_once_and_only_what_an_import_reads(hub: HubServer, store: Path) -> None:
    folder = fetch(NAME, None, store)
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert not {"README.md", "flax_model.msgpack"} & files
    assert len(open_checkpoint(folder).tensors) > 0
    hub.requests.clear()
    assert fetch(NAME, None, store) == folder
    assert not hub.requests


def test_shards_come_one_after_the_other_and_whole_ones_are_kept(hub: HubServer, published: Path, store: Path) -> None:
    shard(published)
    last = "model-00002-of-00002.safetensors"
    (published / last).rename(published.parent / last)
    with pytest.raises(CheckpointError, match=r"org/tiny lacks 1 of its 2 shards on the hub, first 'model-00002"):
        fetch(NAME, None, store)
    (published.parent / last).rename(published / last)
    hub.answer = 0
    folder = fetch(NAME, None, store)
    assert open_checkpoint(folder).tensors.keys() == load_all(published).keys()
    shards = [file for _, file, _ in hub.requests if file.startswith("model-")]
    assert shards == sorted(shards)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_lost_connection_goes_on_where_it_was_lost(hub: HubServer, published: Path, store: Path) -> None:
    hub.cut_after["model.safetensors"] = 10000
    folder = fetch(NAME, None, store)
    assert (folder / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()
    ranges = [range_ for _, file, range_ in hub.requests if file == "model.safetensors"]
    assert ranges[0] == ""
    assert ranges[1].startswith("bytes=")


def test_model_that_is_cached_serves_when_the_hub_does_not(
    hub: HubServer, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fetch(NAME, None, store)
    for hub.answer, hub.reason in ((500, ""), (401, "RepoNotFound"), (403, "GatedRepo")):
        assert fetch(NAME, None, store) == folder
        assert "; taking the cached " in capsys.readouterr().err


def test_offline_takes_the_cached_model_or_says_that_there_is_none(
    hub: HubServer, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(NAME, None, store)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(NAME, None, store) == folder
    assert fetch(NAME, hub.commit, store) == folder
    with pytest.raises(CheckpointError, match=r"org/other is not in the cache .*, and HF_HUB_OFFLINE is set: unset it"):
        fetch("org/other", None, store)
    assert not hub.requests


def test_half_of_a_cached_model_is_an_incomplete_download(hub: HubServer, published: Path, store: Path) -> None:
    shard(published)
    folder = fetch(NAME, None, store)
    (folder / "model-00001-of-00002.safetensors").unlink()
    (folder.parent.parent / "blobs" / "abc.1234.incomplete").touch()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards are missing .* incomplete; 1 unfinished files"):
        open_checkpoint(folder)
    assert fetch(NAME, None, store) == folder
    open_checkpoint(folder)


REFUSALS = {
    "private or missing": (
        401,
        "RepoNotFound",
        None,
        "no file or folder org/tiny, and http.* has no such model for you",
    ),
    "gated": (403, "GatedRepo", None, r"is gated: accept its terms at http://.*/org/tiny, then set HF_TOKEN"),
    "a token that is not valid": (401, "", None, "does not accept your token for org/tiny|no such model for you"),
    "a hub that fails": (503, "", None, "answered 503 for org/tiny: try again later"),
    "a revision that is not there": (0, "", "nope", "org/tiny has no revision 'nope' on http"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(hub: HubServer, store: Path, case: str) -> None:
    hub.answer, hub.reason, revision, message = REFUSALS[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        fetch(NAME, revision, store)
    assert "\n" not in str(caught.value)
    assert not store.exists()


def test_hub_that_cannot_be_reached(hub: HubServer, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        CheckpointError, match=r"no file or folder org/tiny, and it cannot be downloaded from .*: check the"
    ):
        fetch(NAME, None, store)


def test_disk_that_cannot_be_written_is_not_called_a_fault_of_the_network(
    hub: HubServer, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(NotADirectoryError):
        fetch(NAME, None, store)


def test_weights_that_no_import_reads_are_not_downloaded(hub: HubServer, published: Path, store: Path) -> None:
    (published / "model.safetensors").rename(published / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match="has nothing that can be imported: no safetensors"):
        fetch(NAME, None, store)
    for name in ("a-q4.gguf", "a-q8.gguf"):
        (published / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"has 2 \.gguf files: pick one with --file, of a-q4\.gguf, a-q8\.gguf$"):
        fetch(NAME, None, store)


def test_one_of_several_gguf_files_is_picked(hub: HubServer, published: Path, store: Path) -> None:
    for name in ("a-q4.gguf", "a-q8.gguf", "mmproj-a.gguf"):
        (published / name).write_bytes(name.encode())
    path = fetch(NAME, None, store, "a-q8.gguf")
    assert path.read_bytes() == b"a-q8.gguf"
    assert [path.name for path in path.parent.glob("*.gguf")] == ["a-q8.gguf"]
    assert source_text(path) == "org/tiny/a-q8.gguf"
    assert model_name_for(path) == "a-q8"
    with pytest.raises(CheckpointError, match=r"has no file b\.gguf: its \.gguf files are a-q4\.gguf, a-q8\.gguf$"):
        fetch(NAME, None, store, "b.gguf")


def test_one_gguf_file_is_the_model(hub: HubServer, published: Path, store: Path) -> None:
    (published / "model.safetensors").unlink()
    (published / "a-q4.gguf").write_bytes(b"GGUF")
    folder = fetch(NAME, None, store)
    assert [path.name for path in folder.glob("*.gguf")] == ["a-q4.gguf"]


def test_configuration_for_this_version_of_transformers_is_downloaded(
    hub: HubServer, published: Path, store: Path
) -> None:
    config = json.loads((published / "config.json").read_text())
    (published / "config.4.0.0.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    (published / "config.json").write_text(json.dumps(config | {"configuration_files": ["config.4.0.0.json"]}))
    assert open_checkpoint(fetch(NAME, None, store)).config["rms_norm_eps"] == 0.5


Usage = namedtuple("Usage", "total used free")


def test_room_for_download_and_import_is_checked_first(
    hub: HubServer, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 30, 1 << 30, 64 << 20))
    with pytest.raises(
        SpaceError, match=r"needs .* in .*cache to be downloaded and .* to import it into .*store on the"
    ):
        fetch(NAME, None, store)
    assert "model.safetensors" not in {file for _, file, _ in hub.requests}


# Names and paths


def test_a_path_that_exists_comes_before_the_hub(
    hub: HubServer, published: Path, store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(published, tmp_path / "org" / "tiny")
    assert locate(NAME, None, store) == Path(NAME)
    assert not hub.requests
    with pytest.raises(CheckpointError, match="org/tiny is a path, and a revision is of a model on the hub"):
        locate(NAME, "main", store)
    shutil.rmtree(tmp_path / "org")
    assert "snapshots" in str(locate(NAME, None, store))


@pytest.mark.parametrize(
    "path", ["./org/tiny", "/org/tiny", "org/tiny/more", "tiny", "../tiny", "~/tiny", "org/tiny.gguf"]
)
def test_a_path_that_is_not_there_is_no_model_of_the_hub(hub: HubServer, store: Path, path: str) -> None:
    assert not is_hub_name(path)
    with pytest.raises(WeightdError, match="no checkpoint at"):
        locate(path, None, store)
    assert not hub.requests


def test_repository_in_the_cache_stands_for_its_main_branch(hub: HubServer, store: Path) -> None:
    folder = fetch(NAME, None, store)
    assert locate(str(folder.parent.parent), None, store) == folder


def test_snapshot_is_known_by_its_name_on_the_hub(hub: HubServer, store: Path) -> None:
    """Its path differs with every revision."""
    folder = fetch(NAME, None, store)
    assert source_text(folder) == NAME
    assert model_name_for(folder) == "tiny"


def test_blobs_that_models_of_the_cache_share_are_read(hub: HubServer, store: Path, tmp_path: Path) -> None:
    """huggingface_hub 2 keeps them in HF_HUB_CACHE/blobs, and links to them from each model's blobs."""
    folder = fetch(NAME, None, store)
    blob = (folder / "model.safetensors").resolve()
    shared = tmp_path / "cache" / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(f"../../blobs/ab/{'ab' * 32}")
    assert len(open_checkpoint(folder).tensors) > 0
    stray = shared.parent.parent / "key"
    shared.rename(stray)
    blob.unlink()
    blob.symlink_to("../../blobs/key")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        open_checkpoint(folder)


def test_without_huggingface_hub_the_error_says_how_to_get_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"needs huggingface_hub: pip install 'weightd\[import\]'"):
        fetch(NAME, None, store)
