"""Training of the demo models: the parts of the plan, and that a run that was interrupted has the same result."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import train_demo_model
from checkpoints import make_tokenizer
from demonstration import training as demo_training
from demonstration.training import SEED, FiringPenalty, Plan, batch, learning_rate, train
from repository import SCRIPTS
from transformers import OPTForCausalLM, PreTrainedTokenizerFast

PLAN = Plan(steps=8, batch_rows=4, context_tokens=16, learning_rate=1e-3, firing_target=0.1, workers=1)
SCRIPT = SCRIPTS / "train_demo_model.py"


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 300, (2000,), generator=torch.Generator().manual_seed(1)).to(torch.int16)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def model() -> Any:
    torch.manual_seed(SEED)
    return OPTForCausalLM(train_demo_model.config(hidden_size=32, layers=2, heads=2))


def test_an_epoch_shows_every_window_once(tokens: torch.Tensor) -> None:
    windows = len(tokens) // PLAN.context_tokens - 1
    plan = replace(PLAN, batch_rows=windows)
    first, second = batch(torch.arange(2000), 0, plan), batch(torch.arange(2000), 1, plan)
    starts = sorted(first[:, 0].tolist())
    assert {after - before for before, after in pairwise(starts)} == {PLAN.context_tokens}
    assert len(starts) == windows
    assert not torch.equal(first, second)


def test_the_learning_rate_rises_stays_and_falls_to_nothing() -> None:
    plan = replace(PLAN, steps=1000)
    rates = [learning_rate(step, plan) for step in range(1001)]
    assert rates[0] < rates[100] < rates[200] == rates[740] == plan.learning_rate > rates[800] > rates[1000] == 0


def test_resumed_with_more_steps_before_the_decay_is_the_longer_run() -> None:
    short, long = replace(PLAN, steps=1000), replace(PLAN, steps=2000)
    assert [learning_rate(step, short) for step in range(750)] == [learning_rate(step, long) for step in range(750)]


def test_the_penalty_grows_until_few_enough_fire() -> None:
    penalty = FiringPenalty(model(), 0.1)
    before = penalty.factors.clone()
    for _ in range(200):
        penalty.adapt(torch.tensor([0.4, 0.0]))
    assert penalty.factors[0] > before[0]
    assert penalty.factors[1] == demo_training.PENALTY_MIN


def test_the_penalty_makes_a_model_sparser(tokens: torch.Tensor) -> None:
    trained = model()
    penalty = FiringPenalty(trained, 0.1)
    penalty.factors = torch.full((2,), 50.0)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    rows = batch(tokens, 0, PLAN)
    shares = []
    for _ in range(5):
        trained(input_ids=rows)
        shares.append(float(penalty.shares().mean()))
        penalty.term().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert shares[-1] < shares[0]


def test_a_stopped_run_ends_like_one_that_was_not(
    tokens: torch.Tensor, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(tokens: torch.Tensor, step: int, plan: Plan) -> torch.Tensor:
        if step == 4:
            raise KeyboardInterrupt
        return batch(tokens, step, plan)

    whole, first, second = model(), model(), model()
    train(whole, tokenizer, tokens, PLAN, tmp_path / "whole", 1e9)
    monkeypatch.setattr(demo_training, "batch", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(first, tokenizer, tokens, PLAN, tmp_path / "parts", save_every_s=0)
    monkeypatch.undo()
    train(second, tokenizer, tokens, PLAN, tmp_path / "parts", 1e9)
    for (name, wanted), (_, got) in zip(whole.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(wanted, got), name


def test_a_folder_without_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--text-root", str(tmp_path), "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit) as ended:
        train_demo_model.main()
    assert ended.value.code == (
        f"too little HTML or POD under {tmp_path}: install python3-doc and linux-doc, or pass --text-root"
    )


@pytest.mark.slow
def test_two_workers_hold_the_same_weights_as_one(tmp_path: Path) -> None:
    pages = tmp_path / "share/doc/p"
    pages.mkdir(parents=True)
    for number in range(80):
        text = " ".join(f"word{(number * 7 + place * place) % 97} and so on" for place in range(150))
        (pages / f"{number}.html").write_text(f"<p>{text}</p>")
    weights = [trained(tmp_path, workers) for workers in (1, 2)]
    for name, wanted in weights[0].items():
        assert torch.allclose(wanted, weights[1][name], atol=2e-3), name


def trained(folder: Path, workers: int) -> dict[str, torch.Tensor]:
    command = [sys.executable, str(SCRIPT), "--text-root", str(folder / "share"), "--work", str(folder / str(workers))]
    command += ["--hidden", "32", "--heads", "2", "--layers", "1", "--steps", "8", "--context", "32"]
    subprocess.run([*command, "--rows", "4", "--workers", str(workers)], check=True, timeout=240)
    state: dict[str, torch.Tensor] = OPTForCausalLM.from_pretrained(folder / str(workers) / "relu-6m").state_dict()
    return state
