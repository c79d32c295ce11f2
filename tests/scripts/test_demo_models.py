"""The demo models in scripts/models: they are complete and small, have one tokenizer, and their cards are right."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from demonstration.measures import Measures, measure, windows
from repository import SCRIPTS
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig, OPTForCausalLM

MODELS = SCRIPTS / "models"
NAMES = ("relu-6m", "relu-draft")
SHIPPED_BYTES_MAX = 16_000_000
# The cards' numbers are rounded and come from another machine, with other sums.
PERPLEXITY_TOLERANCE = 0.01
SHARE_TOLERANCE = 0.003
SAMPLE = (MODELS / "held_out.txt").read_text()


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def measured() -> dict[str, Measures]:
    tokenizer: Any = AutoTokenizer.from_pretrained(MODELS / NAMES[0])
    rows = windows(torch.tensor(tokenizer(SAMPLE)["input_ids"]))
    return {name: measure(OPTForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32), rows) for name in NAMES}


def told(name: str, start: str) -> float:
    """The number in the card's table row that starts so."""
    found = re.findall(rf"^\| {start}.*?\| ([\d.]+)%? \|$", (MODELS / name / "MODEL_CARD.md").read_text(), re.MULTILINE)
    assert len(found) == 1, found
    return float(found[0])


def test_all_that_ships_is_small() -> None:
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= SHIPPED_BYTES_MAX


def test_weights_are_bf16(name: str) -> None:
    with safe_open(MODELS / name / "model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(key).dtype for key in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_draft_and_model_have_the_same_tokens() -> None:
    first, second = (MODELS / name / "tokenizer.json" for name in NAMES)
    assert first.read_bytes() == second.read_bytes()


def test_the_tokenizer_gives_any_text_back() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(MODELS / NAMES[0])
    for text in (SAMPLE[:5000], "Grüße, 世界 \x00\t", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_generation_is_greedy_unless_asked(name: str) -> None:
    config = GenerationConfig.from_pretrained(MODELS / name)
    assert not config.do_sample
    assert (config.temperature, config.top_k, config.top_p) in {(None, None, None), (1.0, 50, 1.0)}


@pytest.mark.slow
def test_the_card_tells_the_perplexity(name: str, measured: dict[str, Measures]) -> None:
    wanted = measured[name].perplexity
    assert told(name, r"perplexity, sample \(") == pytest.approx(wanted, rel=PERPLEXITY_TOLERANCE)


def test_rounding_to_bf16_costs_nothing(name: str) -> None:
    before, after = told(name, "perplexity, sample, before"), told(name, r"perplexity, sample \(")
    assert after <= before * 1.001


@pytest.mark.slow
def test_the_card_tells_the_sparsity(name: str, measured: dict[str, Measures]) -> None:
    shares = measured[name].firing
    assert [told(name, rf"{layer} ") / 100 for layer in range(len(shares))] == pytest.approx(
        shares, abs=SHARE_TOLERANCE
    )


@pytest.mark.slow
def test_the_card_tells_how_often_the_draft_agrees(measured: dict[str, Measures]) -> None:
    agreement = measured["relu-draft"].agreement(measured["relu-6m"])
    assert told("relu-draft", "next token likeliest") / 100 == pytest.approx(agreement, abs=SHARE_TOLERANCE)


def test_licence_of_the_texts_is_there() -> None:
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (MODELS / "PYTHON_LICENSE.txt").read_text()
