"""The commands `flashclient calibrate` and `eval`: streams, exit statuses and refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import make_config, make_model, make_tokenizer
from cut_model import FetchServer, cut
from sparse_model import make_sparse_model, write_text

from flashclient import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_text(folder / "text", 2000)
    (folder / "empty").write_text("")
    (folder / "short").write_text("a few words")
    (folder / "bytes").write_bytes(b"\xff\xfe" * 1000)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    models = [
        cut(make_sparse_model(), make_tokenizer(), "sparse"),
        cut(make_model(make_config("qwen2")), make_tokenizer(), "silu"),
        cut(make_model(make_config("llama")), make_tokenizer(), "gated"),
        cut(make_sparse_model(), None, "wordless"),
    ]
    with FetchServer(models, folder / "socket") as server:
        yield server.address


def run(command: str, model: str, address: str, *more: str) -> int:
    return cli.main([command, model, "--address", address, "--transport", "grpc", *more])


def test_calibrate_prints_a_row_per_layer_and_the_verdict(
    address: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("calibrate", "sparse", address, "--text", str(folder / "text"), "--ranks", "4") == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == ""
    assert lines[1].split()[:4] == ["layer", "firing", "predicted", "missed"]
    assert [line.split()[0] for line in lines[2:4]] == ["0", "1"]
    assert lines[-2].startswith("mode '")
    assert "of the calibration of 'sparse'" in lines[-1]


def test_calibrate_json_is_one_object(address: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(folder / "text")
    assert run("calibrate", "sparse", address, "--text", text, "--ranks", "4,8", "--kind", "sign", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "sign"
    assert len(report["layers"]) == 2
    assert report["version"] >= 1
    assert report["quality"]["dense"]["perplexity"] > 1


def test_eval_of_a_model_that_was_not_calibrated(
    address: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval", "silu", address, "--text", str(folder / "text"), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exact"]["perplexity"] == pytest.approx(report["dense"]["perplexity"], rel=1e-3)
    assert (report["predict"], report["layers"]) == (None, [])
    assert run("eval", "silu", address, "--text", str(folder / "text")) == 0
    assert "run `flashclient calibrate`" in capsys.readouterr().out


def test_thresholds_are_calibrated_and_evaluated(
    address: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(folder / "text")
    flags = ["--mode", "threshold", "--max-perplexity-loss", "3%"]
    assert run("calibrate", "gated", address, "--text", text, *flags, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["mode"], report["lossy_mode"]) == ("exact", "threshold")
    assert report["quality"]["loss"] <= report["max_perplexity_loss"] == 0.03
    assert run("calibrate", "gated", address, "--text", text, *flags) == 0
    assert "mode 'threshold' skips" in capsys.readouterr().out
    assert run("eval", "gated", address, "--text", text) == 0
    printed = capsys.readouterr().out
    assert "\nthreshold " in printed
    assert "calibration measured a loss of perplexity of" in printed


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["calibrate", "sparse"], 2, "the following arguments are required: --text"),
        (
            ["calibrate", "sparse", "--text", "text", "--target-recall", "1"],
            2,
            "target recall 1 must be between 0 and 1",
        ),
        (["calibrate", "sparse", "--text", "text", "--target-recall", "high"], 2, "invalid float value: 'high'"),
        (["calibrate", "sparse", "--text", "text", "--ranks", "8,0"], 2, "'0' must be a whole number of at least 1"),
        (["calibrate", "sparse", "--text", "text", "--kind", "oracle"], 2, "invalid choice: 'oracle'"),
        (["calibrate", "sparse", "--text", "text", "--tokens", "0"], 2, "'0' must be a whole number of at least 1"),
        (
            ["calibrate", "sparse", "--text", "text", "--tokens", "9999"],
            2,
            "--tokens asks for 9999: pass a longer text",
        ),
        (["calibrate", "sparse", "--text", "nowhere"], 2, "nowhere: no such file or directory"),
        (["calibrate", "sparse", "--text", "empty"], 2, "is empty"),
        (["calibrate", "sparse", "--text", "short"], 2, "at least 1024 are needed"),
        (["calibrate", "sparse", "--text", "bytes"], 2, "is not text in UTF-8"),
        (["calibrate", "silu", "--text", "short"], 1, "its activation, silu, is never exactly zero"),
        (["calibrate", "silu", "--text", "text", "--ranks", "4", "--mode", "threshold"], 2, "--ranks is not a flag"),
        (
            ["calibrate", "sparse", "--text", "text", "--max-perplexity-loss", "2%"],
            2,
            "is not a flag of --mode predict",
        ),
        (
            ["calibrate", "silu", "--text", "text", "--mode", "threshold", "--max-perplexity-loss", "0%"],
            2,
            "must be above 0 and below 1",
        ),
        (["calibrate", "silu", "--text", "text", "--max-perplexity-loss", "some"], 2, "'some' is not a share"),
        (["calibrate", "wordless", "--text", "text"], 2, "stored without a tokenizer"),
        (["eval", "sparse", "--text", "empty"], 2, "is empty"),
        (["eval", "sparse", "--text", "nowhere"], 2, "nowhere: no such file or directory"),
        (["eval", "absent", "--text", "text"], 1, "no model 'absent'"),
        (["eval", "absent", "--text", "nowhere"], 2, "nowhere: no such file or directory"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    status: int,
    message: str,
    address: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    assert run(arguments[0], arguments[1], address, *arguments[2:]) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("flashclient: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
