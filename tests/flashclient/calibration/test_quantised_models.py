"""Calibrations of models whose FFNs are quantised: measured and run on the numbers that are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_config, make_model, make_tokenizer
from sparse_model import make_sparse_model, write_text
from stored_model import read_matrices
from torch import Tensor
from transformers import PreTrainedModel

from flashclient import FlashClient
from flashclient.calibration.calibrate import CalibrationOptions, calibrate, publish_result
from flashclient.calibration.evaluate import Evaluation, dense_model, evaluate_lossy
from flashclient.calibration.layer_walk import read_parts
from flashclient.calibration.sequences import read_sequences
from flashclient.calibration.threshold import ThresholdOptions, calibrate_thresholds
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store
from weightd.store.verify import verify_model
from weightd_proto.encodings import QUANTISED_DTYPES

IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


def imported(model: PreTrainedModel, folder: Path, dtype: str) -> Path:
    model.save_pretrained(folder / "tensors")
    make_tokenizer().save_pretrained(folder / "tensors")
    with Store.open(folder / "store", create=True) as store:
        import_checkpoint(folder / "tensors", store, "m", dtype)
    return folder / "store"


def sequences_for(folder: Path) -> Tensor:
    return read_sequences(write_text(folder / "text", 4000), make_tokenizer(), 256, None, 10**6)


@pytest.mark.parametrize("dtype", QUANTISED_DTYPES)
def test_predict_mode(dtype: str, tmp_path: Path) -> None:
    store, sequences = imported(make_sparse_model("opt", rank=4), tmp_path, dtype), sequences_for(tmp_path)
    with FlashClient("m", store=store, mode="exact") as client:
        for layer in range(len(client.loaded.record.layers)):
            with Store.open(store, readonly=True) as opened:
                *rows, down = read_matrices(opened, opened.model("m"), layer)
            order = np.argsort(client.loaded.placement(layer))
            found = [part[order] for part in read_parts(client.loaded, layer)]
            assert all(torch.equal(a, b) for a, b in zip(found, [*rows, down.T], strict=True))
        result = calibrate(client.loaded, sequences, CalibrationOptions(ranks=(4, 16)))
        publish_result(result, client.loaded)
        with torch.no_grad():
            expected, actual = dense_model(client.loaded)(IDS).logits, client.model(IDS).logits
        assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    found_quality = Evaluation(sequences[-1:])
    with FlashClient("m", store=store, mode="predict") as client:
        evaluate_lossy(client.loaded, found_quality)
    assert found_quality.predict is not None
    assert found_quality.calibrated_loss == pytest.approx(result.loss)
    with Store.open(store, readonly=True) as opened:
        verify_model(opened, "m")


@pytest.mark.parametrize("dtype", QUANTISED_DTYPES)
def test_threshold_mode(dtype: str, tmp_path: Path) -> None:
    store, sequences = imported(make_model(make_config("llama")), tmp_path, dtype), sequences_for(tmp_path)
    with FlashClient("m", store=store, mode="exact") as client:
        result = calibrate_thresholds(client.loaded, sequences, ThresholdOptions(max_loss=0.01))
        publish_result(result, client.loaded)
    found = Evaluation(sequences[3::4])
    with FlashClient("m", store=store, mode="threshold") as client:
        evaluate_lossy(client.loaded, found)
    assert found.threshold is not None
    assert found.threshold.perplexity == pytest.approx(result.quality["threshold"].perplexity, rel=1e-3)
