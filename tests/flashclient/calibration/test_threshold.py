"""flashclient calibrate --mode threshold, against transformers' own model and the kernels, over gRPC."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_config, make_model, make_tokenizer
from cut_model import FetchServer, cut
from sparse_model import loss_of, write_text
from torch import Tensor

from flashclient.calibration.calibrate import publish_result
from flashclient.calibration.evaluate import Evaluation, evaluate_lossy
from flashclient.calibration.sequences import read_sequences
from flashclient.calibration.threshold import (
    GateHistogram,
    ThresholdOptions,
    calibrate_thresholds,
)
from flashclient.client import FlashClient
from flashclient.errors import CalibrationError, OptionError


def sequences_for(folder: Path) -> Tensor:
    return read_sequences(write_text(folder / "text", 4000), make_tokenizer(), 256, None, 10**6)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_the_bound_holds_and_the_mode_loses_what_was_measured(family: str, tmp_path: Path) -> None:
    model = make_model(make_config(family))
    sequences = sequences_for(tmp_path)
    with FetchServer([cut(model, make_tokenizer())], tmp_path / "socket") as server:
        where: dict[str, Any] = {"address": server.address, "transport": "grpc"}
        with FlashClient("tiny", mode="exact", **where) as client:
            result = calibrate_thresholds(client.loaded, sequences, ThresholdOptions(max_loss=0.01))
            published = publish_result(result, client.loaded)
        assert (published.mode, published.lossy_mode) == ("exact", "threshold")
        assert published.perplexity_loss == result.loss <= 0.01
        assert math.exp(loss_of(model, sequences[3::4])) == pytest.approx(result.quality["dense"].perplexity, rel=1e-3)
        found = Evaluation(sequences[3::4])
        with FlashClient("tiny", mode="threshold", **where) as client:
            evaluate_lossy(client.loaded, found)
    assert found.threshold is not None
    assert found.threshold.perplexity == pytest.approx(result.quality["threshold"].perplexity, rel=1e-3)
    assert found.calibrated_loss == pytest.approx(result.loss)
    assert 0 < result.skipped < 1
    for layer in result.layers:
        assert layer.kept == pytest.approx(layer.predicted.mean())
        assert layer.union[0] == pytest.approx(layer.kept, abs=1e-5)


def test_more_loss_skips_more(tmp_path: Path) -> None:
    sequences = sequences_for(tmp_path)
    with (
        FetchServer([cut(make_model(make_config("llama")), make_tokenizer())], tmp_path / "socket") as server,
        FlashClient("tiny", mode="exact", address=server.address, transport="grpc") as client,
    ):
        skipped = [
            calibrate_thresholds(client.loaded, sequences, ThresholdOptions(loss)).skipped for loss in (0.0005, 0.05)
        ]
    assert skipped[0] < skipped[1]


def test_a_histogram_finds_the_value_below_which_a_share_lies() -> None:
    opened = torch.logspace(-3, 3, 4000, dtype=torch.float32)
    histogram = GateHistogram()
    histogram.add(-opened[:1000])
    histogram.add(opened[1000:])
    assert histogram.threshold(0) == 0
    for sparsity in (0.1, 0.5, 0.9):
        below = float((opened < histogram.threshold(sparsity)).float().mean())
        assert sparsity - 0.03 < below <= sparsity
    histogram.add(torch.zeros(10))
    assert np.isfinite(histogram.threshold(0.5))


def test_a_model_that_bears_no_loss_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashclient.calibration.threshold.SPARSITY_MIN", 0.9)
    monkeypatch.setattr("flashclient.calibration.threshold.SPARSITY_MAX", 0.95)
    with (
        FetchServer([cut(make_model(make_config("llama")), make_tokenizer())], tmp_path / "socket") as server,
        FlashClient("tiny", mode="exact", address=server.address, transport="grpc") as client,
        pytest.raises(CalibrationError, match=r"cannot skip any neurons within a loss of 0\.00% of perplexity"),
    ):
        calibrate_thresholds(client.loaded, sequences_for(tmp_path), ThresholdOptions(1e-9))


@pytest.mark.parametrize("loss", [0, 1, -0.1, float("nan")])
def test_refused_losses(loss: float) -> None:
    with pytest.raises(OptionError, match="must be above 0 and below 1"):
        ThresholdOptions(loss)
