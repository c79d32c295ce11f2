"""`weightd probe`: what it says of checkpoints, and that it refuses what an import refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint
from conftest import client_here
from hub_server import HubServer
from huggingface_hub import constants
from multimodal_checkpoints import make_whole
from transformers import AutoModelForCausalLM, MixtralConfig

from weightd.cli import main


@pytest.fixture(autouse=True)
def ask_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightd.planning.probe.child", client_here)


def probed(source: Path | str, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["probe", str(source), "--json", *flags]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def test_sizes_are_those_of_the_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint("opt", tmp_path / "tiny")
    said = probed(source, capsys, "--dtype", "bf16")
    assert not (tmp_path / "store").exists()
    assert main(["import", str(source), "--store", str(tmp_path / "store"), "--dtype", "bf16", "--json"]) == 0
    imported = json.loads(capsys.readouterr().out)
    for name in ("dtype", "bundle_bytes", "ffn_bytes", "resident_bytes"):
        assert said[name] == imported[name]
    (ffns,) = said["ffns"]
    assert (ffns["module"], ffns["count"], ffns["neurons"]) == ("model.decoder.layers.*", 2, 176)
    assert (ffns["place"], ffns["parts"]) == ("PARTS", {"up": "fc1.weight", "down": "fc2.weight"})
    assert said["activation"] == "relu"
    assert sum(each["size_bytes"] for each in said["resident"]) <= said["resident_bytes"]


def test_text_is_one_line_for_each_fact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint("llama", tmp_path / "tiny")
    capsys.readouterr()
    assert main(["probe", str(source)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("tiny: LlamaForCausalLM; ")
    assert [line.split()[0] for line in lines] == ["FFNs", "activation", "streamed", "resident", "note"]
    assert "2 x 176 neurons, each the module model.layers.*.mlp (gate gate_proj.weight, " in lines[0]


def test_experts_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_local_experts": 4}
    config = MixtralConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")  # type: ignore[no-untyped-call]
    (ffns,) = probed(tmp_path / "moe", capsys)["ffns"]
    assert (ffns["place"], ffns["experts"], ffns["neurons"], ffns["count"]) == ("EXPERTS", 4, 48, 2)


def test_towers_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_whole("gemma3", tmp_path / "model")
    said = probed(tmp_path / "model", capsys)
    (left_out,) = said["left_out"]
    assert "vision_tower" in left_out["tensors"]
    assert "only its text part runs" in left_out["reason"]
    assert said["notes"][0] == "only the text part of gemma3 runs"
    assert "has no tokenizer" in said["notes"][1]


def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint("llama", tmp_path / "tiny")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    capsys.readouterr()
    for path, why in (
        (source, "down_proj.weight has shape [64, 176] in the checkpoint, but the configuration says [64, 100]"),
        (tmp_path / "unknown", "no weights in "),
        (tmp_path / "missing", "no checkpoint at "),
    ):
        assert main(["probe", str(path)]) == 1
        error = capsys.readouterr().err
        assert why in error
        assert error.count("\n") == 1


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer(make_checkpoint("llama", tmp_path / "published", layers=1, hidden=32, neurons=48))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    with server.running():
        yield server


def test_models_of_the_hub_come_from_its_cache_only(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", hub.name]) == 1
    assert "org/tiny is not in the cache " in capsys.readouterr().err
    snapshot = tmp_path / "cache" / "models--org--tiny" / "snapshots" / hub.commit
    snapshot.parent.mkdir(parents=True)
    hub.folder.rename(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    assert probed(hub.name, capsys)["model"] == "tiny"
    assert not hub.requests
