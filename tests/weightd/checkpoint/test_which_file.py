"""Folders: which of several files is read, what a tied head means, and that nothing outside of the folder is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint, make_config, make_model, make_tokenizer, stored_tensors, write_torch
from safetensors.torch import load_file, save_file
from stored_model import read_state
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from weightd.checkpoint.opening import open_checkpoint
from weightd.cli import main
from weightd.errors import CheckpointError
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store

INDEX = "model.safetensors.index.json"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of seed 0 in safetensors. Tests import copies of it that they have changed."""
    return make_checkpoint("llama", tmp_path_factory.mktemp("original") / "model", layers=1, hidden=32, neurons=48)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", create=True)


def other_state(seed: int = 1) -> dict[str, torch.Tensor]:
    return stored_tensors(make_model(make_config("llama", layers=1, hidden=32, neurons=48), seed=seed))


def sharded(folder: Path, seed: int) -> None:
    """Writes two shards and their index, with other values."""
    state = other_state(seed)
    names = sorted(state)
    weight_map = {name: f"model-0000{index % 2 + 1}-of-00002.safetensors" for index, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: state[name] for name in names if weight_map[name] == shard}, folder / shard, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def stale_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00009.safetensors"}}))


def torch_before_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_torch(other_state(), folder)
    sharded(folder, 2)


def a_tensor_in_two_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    sharded(folder, 0)
    first = folder / "model-00001-of-00002.safetensors"
    save_file({**load_file(first), "model.norm.weight": torch.full((32,), 7.0)}, first, {"format": "pt"})


def named_weights(folder: Path) -> None:
    save_file(other_state(), folder / "chosen.safetensors", {"format": "pt"})
    change_config(folder, transformers_weights="chosen.safetensors")


def index_of_tensors_that_are_gone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    sharded(folder, 0)
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"] |= {"model.layers.7.mlp.up_proj.weight": shards[0], "model.norm.weight": shards[0]}
    del index["weight_map"]["lm_head.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def no_architectures(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))


def saved_without_its_head(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)
    state = other_state()
    kept = {name.removeprefix("model."): value for name, value in state.items() if name != "lm_head.weight"}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def versions_of_the_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name in ("config.4.0.0.json", "config.99.0.0.json"):
        shutil.copy(folder / "config.json", folder / name)
    config |= {"configuration_files": ["config.99.0.0.json", "config.4.0.0.json"], "vocab_size": 7}
    (folder / "config.json").write_text(json.dumps(config))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


WINNERS: dict[str, Change] = {
    "a stale index beside the file": stale_index,
    "shards beside the file": lambda folder: sharded(folder, 1),
    "torch beside safetensors": lambda folder: write_torch(other_state(), folder),
    "torch beside shards": torch_before_index,
    "a variant and another format": lambda folder: [
        save_file(other_state(), folder / name, {"format": "pt"})
        for name in ("model.fp16.safetensors", "consolidated.safetensors")
    ],
    "a tensor in two shards": a_tensor_in_two_shards,
    "a file that the configuration names": named_weights,
    "an index of tensors that are gone": index_of_tensors_that_are_gone,
    "no architectures": no_architectures,
    "a model saved without its head": saved_without_its_head,
    "a configuration for each version": versions_of_the_configuration,
}


@pytest.mark.parametrize("case", WINNERS)
def test_the_same_file_wins_as_in_transformers(folder: Path, store: Store, case: str) -> None:
    WINNERS[case](folder)
    import_checkpoint(folder, store)
    assert_as_transformers(folder, store)


def assert_as_transformers(folder: Path, store: Store) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = read_state(store, "model")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in expected.items() if name in found
    }
    untied = not torch.equal(expected["lm_head.weight"], expected["model.embed_tokens.weight"])
    assert ("lm_head.weight" in found) == untied


def test_stored_configuration_is_that_of_the_installed_transformers(folder: Path, store: Store) -> None:
    versions_of_the_configuration(folder)
    record = import_checkpoint(folder, store)
    stored = json.loads((store.path / record.name / "hf" / "config.json").read_text())
    assert stored["vocab_size"] == AutoConfig.from_pretrained(folder).vocab_size != 7


# Heads


def tied(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    change_config(folder, tie_word_embeddings=True)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def only_head(state: dict[str, torch.Tensor]) -> None:
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")


def same_head(state: dict[str, torch.Tensor]) -> None:
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()


def no_head(state: dict[str, torch.Tensor]) -> None:
    del state["lm_head.weight"]


def own_head(state: dict[str, torch.Tensor]) -> None:
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


@pytest.mark.parametrize("change", [only_head, same_head, no_head, own_head])
def test_tied_heads_are_as_in_transformers(folder: Path, store: Store, change: Any) -> None:
    tied(folder, change)
    import_checkpoint(folder, store)
    assert_as_transformers(folder, store)


def test_tied_head_named_twice_in_a_torch_file_is_stored_once(folder: Path, store: Store) -> None:
    state = other_state()
    change_config(folder, tie_word_embeddings=True)
    (folder / "model.safetensors").unlink()
    write_torch(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, folder)
    import_checkpoint(folder, store)
    assert_as_transformers(folder, store)


def test_head_of_another_shape_than_its_embedding_is_refused(folder: Path, store: Store) -> None:
    tied(folder, lambda state: state.update({"lm_head.weight": torch.zeros(9, 32)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[9, 32\]"):
        import_checkpoint(folder, store)


def test_head_that_neither_ties_nor_is_there_is_refused(folder: Path, store: Store) -> None:
    """transformers would make one with random values."""
    tied(folder, lambda state: state.pop("lm_head.weight"))
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
        import_checkpoint(folder, store)


def test_tensors_that_are_left_out_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file(folder / "model.safetensors")
    state |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for layer in range(2)}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert main(["import", str(folder), "--store", str(tmp_path / "store")]) == 0
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    said = f"2 tensors of the checkpoint are left out, first {name}: they follow from the configuration\n"
    assert capsys.readouterr().err == f"weightd: note: {said}"


# Links


def link_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(outside(folder))


def outside(folder: Path) -> Path:
    path = folder.parent / "key"
    path.write_text("a secret")
    return path


def link_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to("../elsewhere.safetensors")


def link_templates(folder: Path) -> None:
    (folder.parent / "templates").mkdir()
    (folder.parent / "templates" / "x.jinja").write_text("a secret")
    (folder / "additional_chat_templates").symlink_to("../templates")


def link_template(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "x.jinja").symlink_to(outside(folder))


def link_through_proc(folder: Path) -> None:
    (folder / "merges.txt").symlink_to(f"/proc/self/root/{outside(folder)}")


def index_of(folder: Path, shard: Any) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "private.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))


def bin_index_of(folder: Path, shard: Any) -> None:
    index_of(folder, shard)
    (folder / INDEX).rename(folder / "pytorch_model.bin.index.json")


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def loop(folder: Path) -> None:
    (folder / "vocab.json").symlink_to("vocab.json")


STRANGE: dict[str, tuple[Change, str]] = {
    "a link out": (link_file, r"tokenizer\.json is a link out of its folder, to .*/key: put a copy"),
    "weights by a link": (link_weights, r"model\.safetensors is a link out of its folder"),
    "a folder by a link": (link_templates, r"additional_chat_templates/x\.jinja is a link out of its folder"),
    "a link in a folder": (link_template, r"additional_chat_templates/x\.jinja is a link out of its folder"),
    "a link through /proc": (link_through_proc, r"merges\.txt is a link out of its folder"),
    "a link to itself": (loop, r"vocab\.json cannot be read: a link to nothing"),
    "a link to nothing": (lambda f: (f / "merges.txt").symlink_to("nowhere"), r"a link to nothing \(nowhere\)"),
    "a shard beside the folder": (
        lambda f: index_of(f, "../private.safetensors"),
        r"names a file outside of it: '\.\.",
    ),
    "a shard by its whole path": (lambda f: index_of(f, str(f.parent / "private.safetensors")), "outside of it: '/"),
    "a torch shard beside the folder": (lambda f: bin_index_of(f, "../x.bin"), r"outside of it: '\.\./x\.bin'"),
    "a shard that is a number": (lambda f: index_of(f, float("nan")), "weight is in nan, which is not a file name"),
    "a shard that is a list": (lambda f: index_of(f, ["a"]), r"model\.norm\.weight is in \['a'\]"),
    "a shard of no name": (lambda f: index_of(f, ""), "not a regular file: d"),
    "named weights outside": (lambda f: change_config(f, transformers_weights="../x.safetensors"), "outside of it"),
    "named weights of a kind": (lambda f: change_config(f, transformers_weights="x.bin"), "which is not a safetensors"),
    "a pipe for a tokenizer": (lambda f: pipe(f, "tokenizer.json"), r"tokenizer\.json is not a regular file: p"),
    "a pipe for a configuration": (lambda f: pipe(f, "config.json"), r"config\.json is not a regular file: p"),
    "a pipe for weights": (lambda f: pipe(f, "model.safetensors"), r"model\.safetensors is not a regular file: p"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter .* merge it"),
    "a variant alone": (
        lambda f: (f / "model.safetensors").rename(f / "model.fp16.safetensors"),
        r"no weights in .* does not look at model\.fp16\.safetensors",
    ),
}


@pytest.mark.parametrize("case", STRANGE)
def test_what_is_not_of_the_folder_is_refused(folder: Path, store: Store, case: str) -> None:
    change, message = STRANGE[case]
    make_tokenizer().save_pretrained(folder)
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(folder, store)
    assert {path.name for path in store.path.iterdir()} == {"catalog.mdb", "catalog.mdb-lock"}


def test_snapshots_of_the_cache_are_read_through_their_links(folder: Path, store: Store, tmp_path: Path) -> None:
    """Also if the path of the cache itself has a link."""
    blobs = tmp_path / "disk" / "hub" / "models--a--b" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    folder.rename(blobs)
    (blobs / "chat_template.jinja").write_text("{{ messages }}")
    for file in list(blobs.iterdir()):
        file.rename(blobs / f"sum-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sum-of-{file.name}")
    (tmp_path / "cache").symlink_to("disk/hub")
    cached = tmp_path / "cache" / "models--a--b" / "snapshots" / "0123"
    (tmp_path / "model").symlink_to(cached)
    for number, path in enumerate((snapshot, cached, tmp_path / "model")):
        record = import_checkpoint(path, store, f"m{number}")
        assert {"chat_template.jinja", "tokenizer.json", "config.json"} <= {file.name for file in record.files}
    with pytest.raises(CheckpointError, match=r"no config\.json in .*: give one of the folders in its snapshots/"):
        import_checkpoint(blobs.parent, store, "root")
    (blobs / "sum-of-tokenizer.json").unlink()
    (blobs / "sum-of-tokenizer.json").symlink_to(outside(tmp_path / "model"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link out of its folder"):
        import_checkpoint(cached, store, "other")


def test_links_within_the_folder_are_followed(folder: Path, store: Store) -> None:
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    import_checkpoint(folder, store)
    assert_as_transformers(folder, store)


# Headers


def header(folder: Path, change: Callable[[dict[str, Any]], Any], data: bytes | None = None) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + size])
    change(entries)
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + (content[8 + size :] if data is None else data))


def overlap(entries: dict[str, Any]) -> None:
    entries["lm_head.weight"]["data_offsets"] = entries["model.embed_tokens.weight"]["data_offsets"]


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "tensors that overlap": (overlap, "overlaps another tensor or leaves a gap"),
    "bytes of no tensor": (lambda entries: entries.pop("model.norm.weight"), "leaves a gap|belong to no tensor"),
    "sizes that are no numbers": (
        lambda entries: entries["model.norm.weight"].update(shape=[32.0]),
        "model.norm.weight: its sizes are not whole numbers",
    ),
    "a name that is no text": (
        lambda entries: entries.update({"\ud800": EMPTY}),
        r"holds a tensor under '\\ud800', which",
    ),
    "a size that overflows": (
        lambda entries: entries.update(a={**EMPTY, "shape": [1 << 40, 1 << 40, 0]}),
        "bad header entry for a: its shape does not fit its size",
    ),
    "a shape of booleans": (
        lambda entries: entries["model.norm.weight"].update(shape=[32, True]),
        "model.norm.weight: its sizes are not whole numbers",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_safetensors_refuses_are_refused(folder: Path, case: str) -> None:
    change, message = HEADERS[case]
    header(folder, change)
    with pytest.raises(Exception, match="Error while deserializing header"):
        load_file(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_compressed_torch_files_are_refused(folder: Path) -> None:
    """Their bytes in the file are not in the order of the tensor."""
    import zipfile

    (folder / "model.safetensors").unlink()
    write_torch(other_state(), folder)
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="is compressed: load and save it"):
        open_checkpoint(folder)


def test_error_is_one_line_whatever_a_tensor_is_called(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({**state, "a\nb\x1b[2J": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    assert main(["import", str(folder), "--store", str(tmp_path / "store")]) == 1
    error = capsys.readouterr().err
    assert r"no place for, first a\nb\x1b[2J: correct" in error
    assert error.count("\n") == 1
