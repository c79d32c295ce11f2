"""scripts/make_planted_model.py: transformers can load the checkpoint, and its neurons fire as planned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import make_planted_model as script
import numpy as np
import pytest
import torch
from conftest import answer_here
from make_planted_model import make_planted_model
from planted.layers import SEQUENCE_TOKENS, PlantedModel, thresholds
from planted.plan import (
    FALSE_NEGATIVES,
    PREDICTED_MEAN,
    PUBLISHED,
    SHAPES,
    firing_mean,
    new_share,
    plan_layer,
    union_share,
)
from planted.shapes import checkpoint_shapes
from planted.shares import shares_of
from repository import SCRIPTS
from run_here import run_here
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from weightd.checkpoint.opening import open_checkpoint
from weightd.importing.client_process import derive
from weightd.importing.sources import used_tensors

SCRIPT = SCRIPTS / "make_planted_model.py"
TINY = ("opt-tiny", "llama-tiny")


@pytest.fixture(scope="module", params=TINY)
def planted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("planted") / request.param
    make_planted_model(SHAPES[request.param], folder)
    return request.param, folder


def load(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def test_the_plan_is_the_published_one() -> None:
    shape = SHAPES["opt-6.7b"]
    plan = plan_layer(shape, 0, np.random.default_rng(0))
    assert plan.predicted.mean() == pytest.approx(PUBLISHED["predicted"], rel=0.01)
    assert union_share(plan.predicted, 4) == pytest.approx(PUBLISHED["union_4"], rel=0.1)
    assert new_share(plan.predicted, 4) == pytest.approx(PUBLISHED["new_per_token"], rel=0.1)
    means = [firing_mean(layer, shape.layers) for layer in range(shape.layers)]
    assert np.mean(means) == pytest.approx(PUBLISHED["firing"], rel=0.01)
    assert (means[0], means[-1]) == (0.0156, 0.0536)
    assert means[16] == pytest.approx(0.0266, rel=0.2)


def test_thresholds_give_their_shares() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(8 * SEQUENCE_TOKENS, 64, generator=random) * 3 + torch.linspace(-2, 2, 64)
    shares = np.linspace(0.02, 0.6, 64)
    found = (values + thresholds(values, shares) > 0)[:-SEQUENCE_TOKENS].double().mean(dim=0).numpy()
    assert found.mean() == pytest.approx(shares.mean(), abs=1e-4)
    assert np.abs(found - shares).max() < 0.06


def test_shares_of_tokens_in_a_row() -> None:
    wants = np.zeros((12, 4), dtype=bool)
    wants[::2, 0] = wants[1::2, 1] = True
    fires = wants.copy()
    fires[0] = [False, False, True, False]
    shares = shares_of(fires, wants)
    assert shares.union == [0.25] + [0.5] * 7
    assert shares.new_per_token == 0
    assert (shares.firing, shares.predicted) == (0.25, 0.25)
    assert shares.false_negatives == pytest.approx(1 / 12)
    assert shares.false_positives == pytest.approx(1 / 36)


def test_every_layer_fires_as_planned(planted: tuple[str, Path]) -> None:
    _, folder = planted
    plan = json.loads((folder / "planted" / "plan.json").read_text())
    for layer in plan["layers"]:
        assert layer["firing"] == pytest.approx(layer["planned"]["firing"], rel=0.1)
        assert layer["predicted"] == pytest.approx(PREDICTED_MEAN, rel=0.1)
        assert layer["union"][3] == pytest.approx(layer["planned"]["union_4"], rel=0.1)
        assert layer["false_negatives"] == pytest.approx(FALSE_NEGATIVES, rel=0.5)


def test_the_stream_is_the_one_of_transformers(planted: tuple[str, Path]) -> None:
    """The thresholds fit the residual stream that transformers computes."""
    name, folder = planted
    made = PlantedModel(SHAPES[name], torch.bfloat16, seed=0)
    made.outside()
    for _ in made.layers():
        pass
    ids = np.random.default_rng(0).integers(16, SHAPES[name].vocabulary, (5, SEQUENCE_TOKENS))
    streams: list[torch.Tensor] = []
    model = load(folder)
    body = model.model.decoder if name.startswith("opt") else model.model
    body.layers[-1].register_forward_hook(
        lambda *call: streams.append(call[2][0] if isinstance(call[2], tuple) else call[2])
    )
    with torch.no_grad():
        model(torch.from_numpy(ids))
    assert (streams[0] - made.stream).abs().max() < 0.1
    assert (streams[0] - made.stream).square().mean() < 1e-4


def test_firing_in_transformers_is_the_planned_one(planted: tuple[str, Path]) -> None:
    name, folder = planted
    model = load(folder)
    plan = json.loads((folder / "planted" / "plan.json").read_text())
    inner = "fc1" if name.startswith("opt") else "mlp.gate_proj"
    body = model.model.decoder if name.startswith("opt") else model.model
    fired: list[torch.Tensor] = []
    for layer in body.layers:
        layer.get_submodule(inner).register_forward_hook(lambda *call: fired.append(call[2] > 0))
    ids = torch.from_numpy(np.random.default_rng(9).integers(16, SHAPES[name].vocabulary, (4, SEQUENCE_TOKENS)))
    with torch.no_grad():
        model(ids)
    for found, layer in zip(fired, plan["layers"], strict=True):
        assert found.float().mean().item() == pytest.approx(layer["planned"]["firing"], rel=0.1)


def test_weightd_finds_every_tensor(planted: tuple[str, Path]) -> None:
    _, folder = planted
    checkpoint = open_checkpoint(folder)
    used = used_tensors(derive(checkpoint, answer_here), checkpoint.tensors)
    assert used.keys() == checkpoint_shapes(checkpoint.config).keys() == checkpoint.tensors.keys()


def test_the_same_seed_gives_the_same_model(planted: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = planted
    make_planted_model(SHAPES[name], tmp_path / "again")
    for path in sorted(folder.glob("*.safetensors")):
        again = load_file(tmp_path / "again" / path.name)
        assert all(torch.equal(tensor, again[key]) for key, tensor in load_file(path).items())


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--shape", "opt-tiny", "--dtype", "fp16", "--out", str(tmp_path / "made")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "not quality" in done.stdout
    assert json.loads((tmp_path / "made" / "config.json").read_text())["dtype"] == "float16"
    again = run_here(script.main, *command[1:])
    assert again.returncode == 1
    assert "exists: remove it" in again.stderr
    assert "Traceback" not in again.stderr
