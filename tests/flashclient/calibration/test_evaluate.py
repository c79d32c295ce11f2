"""flashclient eval, against transformers' own model."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, make_tokenizer
from cut_model import FetchServer, cut
from sparse_model import loss_of, make_sparse_model, write_text
from torch import Tensor
from transformers import PreTrainedModel

from flashclient.calibration import calibrate as calibration
from flashclient.calibration import evaluate as evaluation
from flashclient.calibration.calibrate import CalibrationOptions, calibrate, publish_result
from flashclient.calibration.evaluate import Quality, dense_model, evaluate_exact, evaluate_lossy
from flashclient.calibration.sequences import read_sequences
from flashclient.client import FlashClient
from flashclient.errors import CalibrationError, FlashClientError
from flashclient.source.grpc_chunks import GrpcSource


@contextmanager
def clients(model: PreTrainedModel, folder: Path, *modes: str) -> Iterator[list[FlashClient]]:
    """A client per mode of a fresh server of `model`."""
    with ExitStack() as opened:
        server = opened.enter_context(FetchServer([cut(model, make_tokenizer())], folder / "socket"))
        made = [FlashClient("tiny", mode=mode, address=server.address, transport="grpc") for mode in modes]
        yield [opened.enter_context(client) for client in made]


def sequences_for(folder: Path, seed: int = 1) -> Tensor:
    return read_sequences(write_text(folder / f"text{seed}", 2000, seed), make_tokenizer(), 256, None, 10**6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_is_transformers_own(family: str, tmp_path: Path) -> None:
    model = make_sparse_model(family)
    ids = sequences_for(tmp_path)[:1]
    with clients(model, tmp_path, "exact") as (client,), torch.no_grad():
        rebuilt = dense_model(client.loaded)
        assert torch.equal(rebuilt(input_ids=ids).logits, model(input_ids=ids).logits)


def test_without_calibration(tmp_path: Path) -> None:
    model = make_sparse_model()
    sequences = sequences_for(tmp_path)
    with clients(model, tmp_path, "exact") as (client,):
        result = evaluate_exact(client.loaded, sequences)
    report = result.as_dict()
    assert math.log(report["dense"]["perplexity"]) == pytest.approx(loss_of(model, sequences), rel=1e-5)
    assert report["exact"]["perplexity"] == pytest.approx(report["dense"]["perplexity"], rel=1e-4)
    assert report["exact"]["top1_agreement"] > 0.99
    assert report["predict"] is None
    assert report["layers"] == []
    assert report["notes"] == ["predict: not run, as 'tiny' was never calibrated: run `flashclient calibrate`"]
    assert "exact" in result.table()


def test_a_dense_model_that_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "free_bytes", lambda _: 1000)
    with clients(make_sparse_model(), tmp_path, "exact") as (client,):
        client.record.bundles_file_bytes = 2 * 10**9
        result = evaluate_exact(client.loaded, sequences_for(tmp_path)).as_dict()
    assert result["dense"] is None
    assert result["agreement_with"] == "exact"
    assert result["exact"]["top1_agreement"] == 1.0
    assert result["notes"][0] == "dense: not run, as it needs 2.4 GB of memory and 0.0 are free"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_client_generates_the_same_after_calibration_and_evaluation(family: str, tmp_path: Path) -> None:
    prompt, sequences = [5, 17, 200, 31, 8], sequences_for(tmp_path)
    with clients(make_sparse_model(family), tmp_path, "exact", "exact") as (client, other):
        expected = client.generate(prompt, max_new_tokens=12)
        result = calibrate(client.loaded, sequences, CalibrationOptions(ranks=(4,)))
        publish_result(result, client.loaded)
        assert client.generate(prompt, max_new_tokens=12) == expected
        for one in (client, other):
            one.record.CopyFrom(one.loaded.connection.describe("tiny"))
        first, again = (evaluate_exact(client.loaded, sequences[:3]) for _ in range(2))
        assert len(first.layers) == len(client.record.layers), "its layers were walked"
        assert first.as_dict() == again.as_dict() == evaluate_exact(other.loaded, sequences[:3]).as_dict()
        assert client.generate(prompt, max_new_tokens=12) == expected
        with FlashClient("tiny", address=client.loaded.connection.address, transport="grpc", mode="predict") as predict:
            told = predict.generate(prompt, max_new_tokens=12)
            evaluate_lossy(predict.loaded, first)
            source = predict.loaded.source
            assert isinstance(source, GrpcSource)
            assert source.window is not None
            assert source.window.cells_held == 0
            assert predict.generate(prompt, max_new_tokens=12) == told


def test_a_failed_walk_leaves_the_client_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the caller has replaced the forward of a decoder layer."""
    prompt, sequences = [5, 17, 200, 31, 8], sequences_for(tmp_path)
    with clients(make_sparse_model(), tmp_path, "exact") as (client,):
        expected = client.generate(prompt, max_new_tokens=12)
        model: Any = client.model
        first, calls = model.model.decoder.layers[0], 0
        forward = first.forward

        def counted(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            return forward(*args, **more)

        monkeypatch.setattr(first, "forward", counted)

        def fail(*_: object) -> None:
            raise CalibrationError("made to fail")

        monkeypatch.setattr(calibration, "sign_predictor", fail)
        with pytest.raises(CalibrationError, match="made to fail"):
            calibrate(client.loaded, sequences, CalibrationOptions(ranks=(4,)))
        calls = 0
        assert client.generate(prompt, max_new_tokens=12) == expected
        assert calls == 12


def test_a_calibration_waits_for_the_clients_turn(tmp_path: Path) -> None:
    sequences = sequences_for(tmp_path)
    with clients(make_sparse_model(), tmp_path, "exact") as (client,):
        with client.loaded.turns.taken():
            worker = threading.Thread(target=evaluate_exact, args=(client.loaded, sequences[:1]))
            worker.start()
            worker.join(0.2)
            assert worker.is_alive()
            assert client.clock.forward_s == 0.0
        worker.join()
        assert client.clock.forward_s > 0.0
    with pytest.raises(FlashClientError, match="this client is closed"):
        evaluate_exact(client.loaded, sequences[:1])


def test_quality_counts_predicted_tokens() -> None:
    quality = Quality()
    logits = torch.full((3, 4), -1e9)
    logits[0, 2] = logits[1, 1] = logits[2, 0] = 0.0
    quality.add(logits, torch.tensor([0, 2, 1]), torch.tensor([2, 3, 0]))
    assert quality.perplexity == pytest.approx(1.0)
    assert quality.top1_agreement == 0.5
    assert quality.tokens == 2


def test_predict_mode_is_the_reference_of_calibration(tmp_path: Path) -> None:
    """Predict mode loses as much quality as the walk through the layers with masked neurons."""
    model = make_sparse_model()
    sequences = sequences_for(tmp_path)
    with clients(model, tmp_path, "exact", "exact") as (client, exact):
        result = calibrate(client.loaded, sequences, CalibrationOptions(ranks=(4,)))
        publish_result(result, client.loaded)
        tested = sequences[7::8]
        exact.record.CopyFrom(exact.loaded.connection.describe("tiny"))
        with FlashClient("tiny", address=client.loaded.connection.address, transport="grpc", mode="predict") as predict:
            found = evaluate_exact(exact.loaded, tested)
            evaluate_lossy(predict.loaded, found)
    assert found.predict is not None
    assert found.predict.perplexity == pytest.approx(result.quality["predict"].perplexity, rel=1e-3)
    for rates, layer in zip(found.layers, result.layers, strict=True):
        assert rates.firing == pytest.approx(layer.rates.firing, abs=1e-3)
        assert rates.predicted == pytest.approx(layer.rates.predicted, abs=1e-3)
        assert rates.false_negatives == pytest.approx(layer.rates.false_negatives, abs=2e-3)
