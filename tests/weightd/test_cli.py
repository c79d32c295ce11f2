"""The commands of weightd: what they print, and how they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from weightd.cli import main


@pytest.fixture
def store(tmp_path: Path) -> Path:
    source = make_checkpoint("opt", tmp_path / "tiny-opt", dtype="float16")
    assert main(["import", str(source), "--store", str(tmp_path / "store")]) == 0
    return tmp_path / "store"


def test_import_prints_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint("gemma3", tmp_path / "model")
    capsys.readouterr()
    assert main(["import", str(source), "--store", str(tmp_path), "--name", "g", "--dtype", "bf16", "--json"]) == 1
    assert "not a weightd store" in capsys.readouterr().err
    store = str(tmp_path / "store")
    assert main(["import", str(source), "--store", store, "--name", "g", "--dtype", "bf16", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["name"], printed["dtype"], printed["layers"], printed["neurons"]) == ("g", "BF16", 2, 352)
    assert printed["bundle_bytes"] == 3 * 64 * 2


def test_ls_names_family_dtype_and_sizes(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["ls", "--store", str(store)]) == 0
    assert capsys.readouterr().out.startswith("tiny-opt: opt F16, 2 layers, 352 neurons of 256B, FFN ")
    assert main(["ls", "--store", str(store), "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["ffn_bytes"] == (store / "tiny-opt" / "bundles.bin").stat().st_size
    assert model["resident_bytes"] == (store / "tiny-opt" / "resident.safetensors").stat().st_size


def test_verify_then_rm(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--store", str(store), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out.splitlines()[-1])["verified"]
    assert (result["model"], result["bundles"]) == ("tiny-opt", 352)
    assert main(["rm", "tiny-opt", "--store", str(store)]) == 0
    assert not (store / "tiny-opt").exists()
    assert main(["verify", "tiny-opt", "--store", str(store)]) == 1
    assert "no model 'tiny-opt'" in capsys.readouterr().err


def test_corruption_exits_1_with_the_neuron(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (store / "tiny-opt" / "bundles.bin").open("r+b") as file:
        file.write(b"\xff\x00\xff")
    assert main(["verify", "--store", str(store)]) == 1
    assert "weightd: model tiny-opt, layer 0, neuron 0: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["import", "x", "--store", "s", "--dtype", "int5"],
        ["import", "x"],
        ["import", "x", "--store", "s", "--zzz", "y"],
        ["rm", "--store", "s"],
        ["top", "--fast"],
        ["doctor"],
        ["--io-engine", "magic", "--store", "s"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("weightd: ")
    assert error.count("\n") == 1
    assert "; see weightd" in error


def test_dtype_error_lists_the_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "x", "--store", "s", "--dtype", "int5"]) == 2
    error = capsys.readouterr().err
    assert all(dtype in error for dtype in ("keep", "fp32", "bf16", "fp16"))


@pytest.mark.parametrize("command", [["ls"], ["verify"], ["rm", "x"], ["import", "misspelt"]])
def test_commands_make_no_store(tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--store", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith(("weightd: no store at", "weightd: no checkpoint at"))
    assert not (tmp_path / "none").exists()
