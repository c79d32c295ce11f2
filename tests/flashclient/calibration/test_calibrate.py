"""flashclient calibrate, against transformers' own model with hooks, over gRPC."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from activations import ACTIVATIONS
from checkpoints import FAMILIES, make_config, make_model, make_tokenizer
from cut_model import CutModel, FetchServer, cut
from sparse_model import deciding_module, loss_of, make_sparse_model, write_text
from torch import Tensor
from transformers import PreTrainedModel

from flashclient.calibration.calibrate import CalibrationOptions, calibrate, publish_result
from flashclient.calibration.evaluate import Quality
from flashclient.calibration.predictor_training import ReferencePredictor
from flashclient.calibration.publishing import check_may_publish, publish
from flashclient.calibration.result import CalibrationResult, write_files
from flashclient.calibration.sequences import read_sequences
from flashclient.client import FlashClient
from flashclient.errors import CalibrationError, OptionError, RefusedError
from flashclient.kernels.dtypes import DTYPES
from flashclient.model.activations import FUNCTIONS, ZERO_UP_TO, has_exact_zeros, neurons_of
from flashclient.model.predictor_file import LowRank, read_predictors
from weightd_proto.weightd_pb2 import Activation

CHARACTERS = 6000
OPTIONS = CalibrationOptions(ranks=(4, 16))


@contextmanager
def served(model: CutModel, folder: Path) -> Iterator[tuple[FetchServer, FlashClient]]:
    with (
        FetchServer([model], folder / "socket") as server,
        FlashClient("tiny", address=server.address, transport="grpc", mode="exact") as client,
    ):
        yield server, client


def cut_model(model: PreTrainedModel) -> CutModel:
    whole = cut(model, make_tokenizer())
    whole.record.import_id = bytes(range(16))
    return whole


def sequences_for(folder: Path, characters: int = CHARACTERS) -> Tensor:
    return read_sequences(write_text(folder / "text", characters), make_tokenizer(), 256, None, 10**6)


def calibrated(
    model: PreTrainedModel, folder: Path, options: CalibrationOptions = OPTIONS
) -> tuple[CalibrationResult, CutModel, Tensor]:
    whole = cut_model(model)
    sequences = sequences_for(folder)
    with served(whole, folder) as (_, client):
        return calibrate(client.loaded, sequences, options), whole, sequences


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, CalibrationResult, CutModel, Tensor]:
    """An OPT whose FFNs have rank 4, and its calibration."""
    model = make_sparse_model("opt", rank=4)
    return model, *calibrated(model, tmp_path_factory.mktemp("planted"))


@contextmanager
def hooked(model: PreTrainedModel, whole: CutModel, result: CalibrationResult | None) -> Iterator[list[list[Any]]]:
    """Records the neurons that fire in each layer of `model`. With `result`, only predicted neurons may fire."""
    seen: list[list[Any]] = [[] for _ in whole.record.layers]

    def see(index: int, module: Any, arguments: tuple[Tensor], output: Tensor) -> Tensor | None:
        rows = output.reshape(-1, output.shape[-1])
        seen[index].append(rows > 0)
        if result is None:
            return None
        prediction = ReferencePredictor(result.layers[index].predictor, DTYPES[whole.record.compute_dtype])
        placement = torch.from_numpy(whole.placements[index].astype(np.int64))
        wanted = torch.empty_like(rows, dtype=torch.bool)
        wanted[:, placement] = prediction.wanted(arguments[0].reshape(-1, arguments[0].shape[-1]).float())
        return output.masked_fill(~wanted.view(output.shape), -1.0)

    modules = [deciding_module(model, layer.module) for layer in whole.record.layers]
    hooks = [module.register_forward_hook(partial(see, index)) for index, module in enumerate(modules)]
    yield seen
    for hook in hooks:
        hook.remove()


def test_planted_structure_is_found(
    planted: tuple[PreTrainedModel, CalibrationResult, CutModel, Tensor],
) -> None:
    _, result, _, _ = planted
    for layer in result.layers:
        assert 0.02 < layer.rates.firing < 0.3
        assert layer.rates.false_negatives < 0.07
        assert layer.rates.false_positives < 0.01
        assert layer.rank == 4
        assert layer.sign_rates.false_negatives < 0.1
        assert layer.sign_rates.false_positives > layer.rates.false_positives


def test_firing_is_what_transformers_computes(
    planted: tuple[PreTrainedModel, CalibrationResult, CutModel, Tensor],
) -> None:
    model, result, whole, sequences = planted
    with hooked(model, whole, None) as seen:
        loss = loss_of(model, sequences[7::8])
        loss_of(model, sequences[[row for row in range(len(sequences)) if row % 8 != 7]])
    assert math.exp(loss) == pytest.approx(result.quality["dense"].perplexity, rel=1e-4)
    tested = len(sequences[7::8])
    for index, layer in enumerate(result.layers):
        of_tested = torch.cat(seen[index][:tested]).float()
        assert layer.rates.firing == pytest.approx(of_tested.mean().item(), rel=1e-3)
        frequency = torch.cat(seen[index]).float().mean(0).numpy()[whole.placements[index]]
        np.testing.assert_allclose(layer.frequency, frequency, atol=1e-3)


def test_quality_of_prediction_is_that_of_masked_neurons(
    planted: tuple[PreTrainedModel, CalibrationResult, CutModel, Tensor],
) -> None:
    model, result, whole, sequences = planted
    with hooked(model, whole, result):
        loss = loss_of(model, sequences[7::8])
    assert math.exp(loss) == pytest.approx(result.quality["predict"].perplexity, rel=1e-4)
    assert result.quality["predict"].perplexity != result.quality["dense"].perplexity


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_walked_as_transformers_does(family: str, tmp_path: Path) -> None:
    model = make_sparse_model(family)
    result, _, sequences = calibrated(model, tmp_path, replace(OPTIONS, ranks=(4,)))
    assert math.exp(loss_of(model, sequences[7::8])) == pytest.approx(result.quality["dense"].perplexity, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_predictors_are_stored_in_the_models_dtype(dtype: str, tmp_path: Path) -> None:
    result, whole, _ = calibrated(make_sparse_model("opt", dtype=dtype), tmp_path)
    for layer in result.layers:
        assert isinstance(layer.predictor, LowRank)
        assert layer.predictor.input.dtype == np.uint16
        assert layer.rates.false_negatives < 0.08
    write_files(result, whole.record, tmp_path)
    assert len(read_predictors(np.fromfile(tmp_path / "predictors.safetensors", np.uint8), whole.record)) == 2


def test_the_same_seed_gives_the_same_files(
    planted: tuple[PreTrainedModel, CalibrationResult, CutModel, Tensor], tmp_path: Path
) -> None:
    model, first, whole, _ = planted
    again, _, _ = calibrated(model, tmp_path)
    names = [write_files(result, whole.record, tmp_path) and read_all(tmp_path) for result in (first, again)]
    assert names[0] == names[1]


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


def test_kind_sign_is_published_as_such(tmp_path: Path) -> None:
    result, whole, _ = calibrated(make_sparse_model(), tmp_path, replace(OPTIONS, kind="sign"))
    head, names, *rows, _mode = result.table().splitlines()
    assert head.count("sign bits") == names.count("predicted") == 1
    assert {row.count("%") for row in rows} == {5}
    assert [layer.rank for layer in result.layers] == [0, 0]
    assert result.layers[0].rates == result.layers[0].sign_rates
    write_files(result, whole.record, tmp_path)
    header = (tmp_path / "predictors.safetensors").read_bytes()[:1000]
    assert b'"kind":"sign"' in header
    assert "sign bits" in result.table()


def test_a_layer_where_all_or_none_fire(tmp_path: Path) -> None:
    model = make_sparse_model("opt")
    with torch.no_grad():
        for layer, bias in ((0, 100.0), (1, -100.0)):
            model.get_parameter(f"model.decoder.layers.{layer}.fc1.bias").fill_(bias)
    result, _, _ = calibrated(model, tmp_path)
    assert [layer.rates.predicted for layer in result.layers] == [1.0, 0.0]
    assert [layer.rates.false_negatives for layer in result.layers] == [0.0, 0.0]
    assert result.quality["predict"].perplexity == result.quality["dense"].perplexity


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_an_activation_without_zeros_is_refused_at_once(activation: str, tmp_path: Path) -> None:
    model = make_model(make_config("llama", hidden_act=activation))
    with pytest.raises(
        CalibrationError, match=r"model 'tiny' cannot be calibrated for mode 'predict': its activation, (silu|gelu)"
    ):
        calibrated(model, tmp_path)


def test_which_activations_have_exact_zeros() -> None:
    zeros = {name for name in FUNCTIONS if has_exact_zeros(ACTIVATIONS[name])}
    assert zeros == ZERO_UP_TO.keys()
    assert has_exact_zeros(Activation(function="leaky_relu", parameter=0.0))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_exact_zeros_lie_where_the_function_is_flat(name: str) -> None:
    """Up to a number, or nowhere but at one. Laplace's is zero by rounding below -1.6."""
    made = ACTIVATIONS[name]
    v = torch.linspace(-6 if name != "laplace" else -1.5, 6, 1201, dtype=torch.float64)
    zero = neurons_of(made, v) == 0
    if name in ZERO_UP_TO:
        assert torch.equal(zero, v <= ZERO_UP_TO[name](made.parameter))
    else:
        assert zero.sum() <= 1


def test_a_model_whose_neurons_all_fire_is_refused(tmp_path: Path) -> None:
    model: Any = make_model(make_config("opt"))
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.bias.fill_(100.0)
    with pytest.raises(CalibrationError, match=r"100\.0% of the neurons of model 'tiny' are not zero"):
        calibrated(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_recall": 1.0}, "target recall 1 must be between 0 and 1"),
        ({"target_recall": -0.5}, "target recall -0.5 must be"),
        ({"target_recall": float("nan")}, "target recall nan must be"),
        ({"ranks": ()}, r"ranks \(\) must be whole numbers of at least 1"),
        ({"kind": "oracle"}, "kind 'oracle' is not known: use low_rank or sign"),
    ],
)
def test_refused_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CalibrationOptions(**change)


def quality(perplexity: float) -> Quality:
    return Quality(tokens=1, nats=math.log(perplexity))


@pytest.mark.parametrize(
    ("change", "union", "perplexity", "mode", "reason"),
    [
        ({}, 0.0, 10.02, "predict", "costs 0.20% of perplexity"),
        ({}, 0.0, 10.06, "exact", "costs 0.60% of perplexity, more than 0.5%"),
        ({"predicted": 0.6}, 0.0, 10.0, "exact", "of the FFNs, predictors included: prediction pays below 50%"),
        ({}, 0.3, 10.0, "exact", "30% of the neurons are new with each token: prediction pays below 25%"),
    ],
)
def test_the_mode_follows_from_what_was_measured(
    planted: tuple[PreTrainedModel, CalibrationResult, CutModel, Tensor],
    change: dict[str, float],
    union: float,
    perplexity: float,
    mode: str,
    reason: str,
) -> None:
    found = planted[1]
    steps = np.array([0, 0, 0, 0, union, union, union, union], np.float32)
    layers = [replace(layer, rates=replace(layer.rates, **change), union=steps) for layer in found.layers]
    result = replace(found, layers=layers, quality={"dense": quality(10.0), "predict": quality(perplexity)})
    assert result.mode()[0] == mode
    assert reason in result.mode()[1]


def test_published_files_are_whole(
    planted: tuple[PreTrainedModel, CalibrationResult, CutModel, Tensor], tmp_path: Path
) -> None:
    model, result, _, sequences = planted
    with served(cut_model(model), tmp_path) as (server, client):
        check_may_publish(client.loaded.connection, client.record)
        published = publish_result(result, client.loaded)
        assert (published.version, published.mode) == (1, result.mode()[0])
        files = server.calibrations["tiny"]
    assert [file.name for file in published.files] == list(files)
    report = json.loads(files["report.json"])
    assert report["text_tokens"] == sequences.numel()
    assert set(report["layers"][0]) >= {"firing", "predicted", "false_negatives", "false_positives", "rank", "bytes"}
    statistics = safetensors.numpy.load(files["statistics.safetensors"])
    for index, layer in enumerate(result.layers):
        np.testing.assert_array_equal(statistics[f"layers.{index}.frequency"], layer.frequency)
        assert statistics[f"layers.{index}.predicted"].mean() == pytest.approx(layer.rates.predicted, abs=0.02)
        assert statistics[f"layers.{index}.union"][0] == pytest.approx(layer.rates.predicted, rel=1e-5)
    assert {name.rsplit(".")[-1] for name in statistics if name.startswith("layers.")} == {
        "frequency",
        "predicted",
        "union",
    }


def test_a_calibration_of_another_import_is_refused(tmp_path: Path) -> None:
    with served(cut_model(make_sparse_model()), tmp_path) as (_, client):
        record = type(client.record)()
        record.CopyFrom(client.record)
        record.import_id = b"another import!!"
        with pytest.raises(RefusedError, match="another import"):
            check_may_publish(client.loaded.connection, record)
        (tmp_path / "file").write_bytes(b"data")
        with pytest.raises(RefusedError, match="another import"):
            publish(client.loaded.connection, record, "exact", tmp_path, ("file",))
