"""Calibration, evaluation and predict mode of a model with a table on flash: as of the model with a resident one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_tokenizer
from daemon import serving
from sparse_model import make_sparse_model, write_text

from flashclient import FlashClient, cli
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store

RESIDENT, TABLE = "resident", "table"
PROMPTS = ([5, 17, 200, 31, 8], [290, 3, 3, 77, 150, 9])
SETTINGS: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": -1}
MEASURED_TIME = ("seconds", "version", "created_unix_s")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text", 4000)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A weightd that serves a sparse model as it is, and once more with its input embedding as a table."""
    folder = tmp_path_factory.mktemp("sparse")
    make_sparse_model("llama").save_pretrained(folder / "checkpoint")
    make_tokenizer().save_pretrained(folder / "checkpoint")
    with Store.open(folder / "store", create=True) as store:
        import_checkpoint(folder / "checkpoint", store, RESIDENT)
        record = import_checkpoint(folder / "checkpoint", store, TABLE, tables_above_bytes=0)
    assert [table.layers[0].module for table in record.tables] == ["model.embed_tokens"]
    with serving(folder / "store") as daemon:
        yield daemon.address


def report(capsys: pytest.CaptureFixture[str], command: str, model: str, address: str, *more: str) -> dict[str, Any]:
    """What the command prints, without what differs from run to run."""
    assert cli.main([command, model, "--address", address, "--json", *more]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return {name: value for name, value in said.items() if name not in MEASURED_TIME}


def test_a_table_changes_nothing(address: str, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrate = "--text", str(text), "--ranks", "4"
    calibrated = report(capsys, "calibrate", TABLE, address, *calibrate)
    assert calibrated == report(capsys, "calibrate", RESIDENT, address, *calibrate)
    assert calibrated["quality"]["dense"]["perplexity"] > 1

    evaluated = report(capsys, "eval", TABLE, address, "--text", str(text))
    assert evaluated == report(capsys, "eval", RESIDENT, address, "--text", str(text))
    assert evaluated["dense"]["perplexity"] == pytest.approx(evaluated["exact"]["perplexity"], rel=1e-4)
    assert evaluated["predict"] is not None

    made = []
    for model in (TABLE, RESIDENT):
        with FlashClient(model, address=address, mode="predict") as client:
            made.append([client.generate(torch.tensor([prompt]), **SETTINGS) for prompt in PROMPTS])
    for of_table, of_resident in zip(*made, strict=True):
        assert torch.equal(of_table, of_resident)


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_a_threshold_is_calibrated(
    transport: str, address: str, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--text", str(text), "--mode", "threshold", "--transport", transport
    said = report(capsys, "calibrate", TABLE, address, *options)
    assert said == report(capsys, "calibrate", RESIDENT, address, *options)
