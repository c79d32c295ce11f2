"""The demo's second part on the models that ship: predict mode is as good as dense, the draft changes no token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from demonstration.sparse import DRAFT, MODEL, MODELS, show_sparse
from run_here import run_here

from flashclient import FlashClient, cli
from weightd.cli import main as weightd_main

LOSS_MAX = 0.005
FALSE_NEGATIVES_MAX = 0.055
FALSE_POSITIVES_MAX = 0.05
FALSE_POSITIVES_MAX_FIRST = 0.08
NEW_TOKENS = 48
PROMPTS = ("The function returns a list of", "If the file does not exist,", "This option was added in version")


CALIBRATION_TOKENS = 2048  # enough for most tests; the demo takes more for better predictors
CALIBRATION_TOKENS_SLOW = 8192


def run_command(module: str, *arguments: str) -> str:
    """What the command prints."""
    done = run_here({"flashclient": cli.main, "weightd": weightd_main}[module], module, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the demo's store. Slow tests take more of the demo's text for calibration."""
    folder = tmp_path_factory.mktemp("demo")
    slow = any(item.path == request.path and item.get_closest_marker("slow") for item in request.session.items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("demonstration.sparse.run", run_command)
        tokens = CALIBRATION_TOKENS_SLOW if slow else CALIBRATION_TOKENS
        patch.setattr("demonstration.sparse.CALIBRATION_TOKENS", tokens)
        show_sparse(folder, NEW_TOKENS)
    return folder


@pytest.fixture(scope="module")
def quality(shown: Path) -> dict[str, Any]:
    """`flashclient eval` after the demo, on text that neither training nor calibration saw."""
    command = ["eval", MODEL, "--store", str(shown / "sparse-store"), "--json"]
    command += ["--text", str(MODELS / "held_out.txt"), "--tokens", "4096"]
    answer: dict[str, Any] = json.loads(run_command("flashclient", *command))
    return answer


@pytest.mark.slow
def test_predict_mode_costs_next_to_nothing(quality: dict[str, Any]) -> None:
    dense = quality["dense"]["perplexity"]
    assert quality["exact"]["perplexity"] == pytest.approx(dense, rel=1e-3)
    assert quality["predict"]["perplexity"] <= dense * (1 + LOSS_MAX)


@pytest.mark.slow
def test_predictors_miss_little_and_want_little_else(quality: dict[str, Any]) -> None:
    for index, layer in enumerate(quality["layers"]):
        assert layer["false_negatives"] <= FALSE_NEGATIVES_MAX, index
        assert layer["false_positives"] <= (FALSE_POSITIVES_MAX if index else FALSE_POSITIVES_MAX_FIRST), index
        assert layer["predicted"] < 2 * layer["firing"], index


def test_the_draft_changes_no_token_and_saves_steps(shown: Path) -> None:
    with FlashClient(MODEL, store=shown / "sparse-store", mode="predict") as client:
        alone, drafted, accepted = 0, 0, 0
        for prompt in PROMPTS:
            text = client.generate(prompt, max_new_tokens=NEW_TOKENS)
            alone += client.stats().steps
            assert client.generate(prompt, max_new_tokens=NEW_TOKENS, assistant_model=str(MODELS / DRAFT)) == text
            drafted += client.stats().steps
            accepted += client.stats().accepted_tokens
    assert accepted > 0
    assert drafted < alone


def test_run_again_it_uses_what_is_there(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrated_ns = (shown / "calibration.json").stat().st_mtime_ns
    show_sparse(shown, NEW_TOKENS)
    assert (shown / "calibration.json").stat().st_mtime_ns == calibrated_ns
    told = capsys.readouterr().out
    for row in ("tokens/s", "neurons firing", "neurons predicted", "bytes read per token", "hit rate of the pool"):
        assert f"\n{row}" in told
    assert "the same text" in told
