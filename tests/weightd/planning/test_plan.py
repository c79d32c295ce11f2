"""`weightd plan`: from a configuration, from a store, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_checkpoint, make_config
from conftest import client_here
from packed_checkpoints import make_packed
from quantised_checkpoints import make_fp8, make_gpt_oss
from safetensors.numpy import save
from stored_calibration import offline

from weightd.cli import main
from weightd.importing.client_process import TokenCost
from weightd.planning.published import SLIDES
from weightd.planning.subject import subject_of
from weightd.store.device_profile import assumed_profile
from weightd.store.store import Store

PLANNED = (
    *("gptq 8 bits", "gptq desc_act", "awq", "packed with zeros", "packed channels", "int8 with zeros"),
    *("float8 of a tensor", "float8 blocks", "nvfp4", "modelopt", "nf4"),
)
LEFT_OUT = {"fp8": {"modules_to_not_convert": ["model.layers.1.mlp.experts"]}}  # the fixture writes them as they are
QUANTISED: dict[str, Callable[[Path], Any]] = {
    **{kind: partial(make_packed, kind) for kind in PLANNED},
    "fp8": partial(make_fp8, "deepseek_v3"),
    "fbgemm": lambda folder: make_fp8("llama", folder, "row"),
    "mxfp4": make_gpt_oss,
}


@pytest.fixture(autouse=True)
def ask_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightd.planning.plan.child", client_here)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", "--json", "--device", "2", *map(str, arguments)]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def refused(capsys: pytest.CaptureFixture[str], status: int, *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main(["plan", *map(str, arguments)]) == status
    error = capsys.readouterr().err
    assert error.startswith("weightd: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A folder that holds a configuration and nothing else."""
    make_config("llama", hidden=64, neurons=4096, torch_dtype="bfloat16").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_quantised_folder_is_planned_as_it_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, store = make_packed("awq", tmp_path / "model").folder, tmp_path / "store"
    assert main(["import", str(source), "--store", str(store)]) == 0
    with Store.open(store, readonly=True) as opened:
        record = opened.model("model")
    said = planned(capsys, source)
    assert (said["ffn_bytes"], said["resident_bytes"]) == (record.bundles_file_bytes, record.resident_file_bytes)
    weights, config = source / "elsewhere.safetensors", json.loads((source / "config.json").read_text())
    (source / "model.safetensors").rename(weights)
    (source / "config.json").write_text(json.dumps(config | {"transformers_weights": weights.name}))
    assert planned(capsys, source)["resident_bytes"] == record.resident_file_bytes
    weights.unlink()
    without = planned(capsys, source)
    assert (without["ffn_bytes"], without["resident_bytes"]) == (said["ffn_bytes"], said["resident_bytes"])
    (expected,) = (each for each in without["assumptions"] if "awq" in each)
    assert expected == (
        "linear layers are in awq, but for those that the configuration leaves out, as no weights are there"
    )


@pytest.mark.parametrize("kind", QUANTISED)
def test_what_an_import_keeps_is_planned_from_the_configuration(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the encodings, and so the bytes, that an import gives the checkpoint of the same configuration."""
    monkeypatch.setattr("weightd.planning.subject._cost", lambda *_: TokenCost(0, 0))
    source = QUANTISED[kind](tmp_path / "model").folder
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= LEFT_OUT.get(kind, {})
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_text(json.dumps(config))
    with client_here() as ask:
        found, without = (
            subject_of(str(path), None, None, assumed_profile(2.0), None, ask).record
            for path in (source, tmp_path / "alone")
        )
    assert found.bundle == without.bundle
    assert [layer.cells for layer in found.layers] == [layer.cells for layer in without.layers]
    formats = [{tensor.name: tensor.dtype for tensor in record.resident} for record in (found, without)]
    assert formats[0] == formats[1]
    assert found.resident_file_bytes == without.resident_file_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "compressed-tensors", "format": ["x"]}, "compressed-tensors of format ['x'], read are"),
        ({"quant_method": "modelopt", "quant_algo": {}}, "modelopt's {}, read are FP8 and NVFP4"),
        ({"quant_method": "aqlm"}, "is quantised (aqlm): import the unquantised"),
    ],
)
def test_what_an_import_would_refuse_is_not_planned(
    settings: dict[str, Any], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(values | {"quantization_config": settings}))
    assert message in refused(capsys, 1, config)


def test_a_configuration_gives_the_sizes_of_the_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint("llama", tmp_path / "model", dtype="bfloat16")
    store = tmp_path / "store"
    assert main(["import", str(source), "--store", str(store)]) == 0
    for file in source.iterdir():
        if file.name != "config.json":
            file.unlink()
    said = planned(capsys, source, "--dtype", "bf16")
    with Store.open(store, readonly=True) as opened:
        record = opened.model("model")
    assert said["resident_bytes"] == record.resident_file_bytes
    assert said["ffn_bytes"] == record.bundles_file_bytes
    assert said["model_class"] == "LlamaForCausalLM"
    assert min(said["ffn_ms"], said["besides_ms"]) > 0
    rows = 2 * 2 * 2  # layers, heads, keys and values: of 16 elements, and padded to a block of 34 bytes
    assert (said["kv_bytes_per_token"], said["kv_int8_bytes_per_token"]) == (rows * 16 * 2, rows * 34)
    from_store = planned(capsys, "model", "--store", store)
    assert from_store["smallest_dram_bytes"] == said["smallest_dram_bytes"]
    assert from_store["plans"][-1]["read_bytes_per_token"] == 0


def test_the_file_and_its_folder_are_the_same_model(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = planned(capsys, config), planned(capsys, config / "config.json")
    assert one["smallest_dram_bytes"] == other["smallest_dram_bytes"]
    assert [each["dram_bytes"] for each in one["plans"]] == [each["dram_bytes"] for each in other["plans"]]


def test_one_size_gives_one_plan(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = planned(capsys, config)
    half = (sizes["smallest_dram_bytes"] + sizes["plans"][-1]["dram_bytes"]) // 2
    (plan,) = planned(capsys, config, "--dram", str(half))["plans"]
    assert plan["dram_bytes"] == half
    assert plan["pool_share"] == pytest.approx(0.5, abs=0.05)
    assert plan["read_bytes_per_token"] > 0
    assert plan["token_ms"] == pytest.approx(1e3 / plan["tokens_per_s"])


def test_the_text_has_a_row_for_each_size(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["plan", str(config), "--device", "2"]) == 0
    above, table = capsys.readouterr().out.split("\n\n")
    assert "smallest   --dram " in above
    assert "2 GB/s, as given with --device" in above
    assert table.splitlines()[0].split()[:2] == ["--dram", "pool"]
    assert all(line.endswith(" tokens/s") for line in table.splitlines()[1:])


@pytest.mark.parametrize("name", SLIDES)
def test_shipped_configurations_are_derived(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = planned(capsys, name)
    whole = (said["resident_bytes"] + said["ffn_bytes"]) / 1e9
    assert whole == pytest.approx(SLIDES[name].conventional_gb, rel=0.12)
    assert said["slides"] == vars(SLIDES[name])
    assert said["plans"][0]["dram_bytes"] == said["smallest_dram_bytes"]
    if name == "mixtral-8x7b":
        assert "a published mixture" in said["assumptions"][-1]
        assert said["smallest_dram_bytes"] < SLIDES[name].assisted_gb * 1e9


def test_predict_mode_needs_a_calibration_or_an_assumption(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "predict mode needs a calibration, and " in refused(capsys, 2, config, "--mode", "predict")
    assert "--firing is for mode predict" in refused(capsys, 2, config, "--mode", "exact", "--firing", "0.1")
    exact, said = planned(capsys, config), planned(capsys, config, "--firing", "0.1")
    assert (exact["mode"], said["mode"]) == ("exact", "predict")
    # Ten neurons share a cell, so most cells are wanted.
    assert said["plans"][0]["read_bytes_per_token"] < exact["plans"][0]["read_bytes_per_token"] * 0.8
    assert said["assumptions"][-1].startswith("10% of the neurons are predicted")


def test_a_calibration_is_planned_for_the_mode_that_it_is_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, store = make_checkpoint("llama", tmp_path / "model", dtype="bfloat16"), tmp_path / "store"
    assert main(["import", str(source), "--store", str(store)]) == 0
    with Store.open(store, readonly=True) as opened:
        record = opened.model("model")
    shares = {
        f"layers.{index}.{name}": (np.arange(layer.neurons) < layer.neurons // 2).astype(np.float32)
        for index, layer in enumerate(record.layers)
        for name in ("predicted", "frequency")
    }
    offline(store, record, statistics=save(shares), mode="exact", lossy_mode="threshold")
    error = refused(capsys, 2, "model", "--store", store, "--mode", "predict")
    assert "model was calibrated for mode threshold: plan that, or run `flashclient calibrate --mode predict`" in error
    exact, said = (planned(capsys, "model", "--store", store, "--mode", mode) for mode in ("exact", "threshold"))
    assert said["mode"] == "threshold"
    read, of_exact = (each["plans"][0]["read_bytes_per_token"] for each in (said, exact))
    assert 0 < read < exact["ffn_bytes"] / 2 < of_exact


def test_too_little_memory_says_the_smallest(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--dram 1MiB is too small: model needs at least " in refused(capsys, 1, config, "--dram", "1MiB")


def test_unknown_names_list_the_shipped_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, 1, "llama-3-9b")
    assert all(name in error for name in SLIDES)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    assert "unknown model type 'nothing'" in refused(capsys, 1, tmp_path)
    (tmp_path / "config.json").write_text("[")
    assert "is not JSON" in refused(capsys, 1, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(capsys, 1, tmp_path / "empty")


@pytest.mark.parametrize("flags", [("--firing", "3"), ("--device", "-1"), ("--window", "x"), ("--dram", "12 parsecs")])
def test_wrong_flags_exit_2(config: Path, flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert flags[1].split()[0] in refused(capsys, 2, config, *flags)
