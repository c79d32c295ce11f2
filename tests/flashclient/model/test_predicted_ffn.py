"""The FFN of predict mode against exact mode and a plain implementation, whatever the source does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_config, make_model
from cut_model import ArraySource, CutModel, cut
from numpy.typing import NDArray
from predictors import everything, lossy, oracle
from torch import Tensor

from flashclient._native import Ffn, Workers
from flashclient.errors import DaemonLostError
from flashclient.model.ffn import Clock, ExactFFN
from flashclient.model.predicted_ffn import PredictedFFN
from flashclient.model.predictor import Predictors
from flashclient.model.step import Step, Steps
from flashclient.source.bundle_source import retry_on_loss
from weightd_proto.encodings import plain

NEURONS, HIDDEN = 176, 64


@dataclass
class Fixed(Steps):
    """A Steps that gives the step that the test has set."""

    step: Step

    def current(self, tokens: int) -> Step:
        assert tokens == self.step.tokens
        return self.step


@pytest.fixture(scope="module")
def parts() -> CutModel:
    return cut(make_model(make_config("llama", layers=3, hidden=HIDDEN, neurons=NEURONS, hidden_act="relu")))


def gate_rows(parts: CutModel, layer: int) -> NDArray[np.float32]:
    rows: NDArray[np.float32] = parts.bundles[layer].view(np.float32).reshape(NEURONS, 3, HIDDEN)[:, 0]
    return rows


class Sum:
    """A PredictedFFN on an ArraySource. The attributes are set on the source's cells."""

    def __init__(self, parts: CutModel, predictors: bytes, window: int = 4, per_cell: int = 3, **cells: int) -> None:
        self.source = ArraySource(parts, [50, 7], per_cell, predictors)
        for name, value in cells.items():
            setattr(self.source.cells, name, value)
        workers = Workers(2)
        kernels = Ffn(workers, [plain("F32")] * 3, HIDDEN, "relu")
        self.exact = ExactFFN(self.source, [kernels] * len(parts.record.layers), HIDDEN, Clock())
        self.predictors = Predictors(self.source.predictors(), parts.record, workers)
        self.steps = Fixed(Step(1, 1))
        self.window = self.source.open_window(window)
        self.predicted = PredictedFFN(
            self.source, kernels, self.predictors, self.window, self.steps, self.exact, self.exact.clock
        )

    def __call__(self, layer: int, step: Step, x: Tensor, bias: Any = None) -> Tensor:
        self.steps.step = step
        return self.predicted(layer, x, bias)


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def reference(parts: CutModel, layer: int, x: Tensor, wanted: NDArray[np.bool_]) -> Tensor:
    weights = torch.from_numpy(parts.bundles[layer].view(np.float32).reshape(NEURONS, 3, HIDDEN).copy()).double()
    fired = torch.relu(x.double() @ weights[:, 0].T) * (x.double() @ weights[:, 1].T)
    total: Tensor = (fired * torch.from_numpy(wanted)) @ weights[:, 2]
    return total


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 40])
def test_an_oracle_gives_the_bits_of_exact_mode(parts: CutModel, tokens: int) -> None:
    x = rows(tokens)
    bias = np.random.default_rng(1).normal(0, 0.125, NEURONS).astype(np.float32)
    biases = np.stack([bias, np.zeros_like(bias)])
    opened = oracle(parts.record, lambda layer: gate_rows(parts, layer), [bias] * 3)
    for predictors in (everything(parts.record), opened):
        made = Sum(parts, predictors)
        assert torch.equal(made(1, Step(tokens, 1), x, biases), made.exact(1, x, biases))
    assert (made.predictors.row_masks(1, x.numpy()) == 0).any() or tokens > 3, "an oracle that wants all is none"


@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 40])
def test_a_row_is_the_sum_over_what_it_wants(parts: CutModel, tokens: int) -> None:
    made = Sum(parts, lossy(parts.record))
    x = rows(tokens)
    masks = made.predictors.row_masks(2, x.numpy())
    wanted = np.stack([masks[row // 16] >> row % 16 & 1 for row in range(tokens)]).astype(np.bool_)
    assert 0.05 < wanted.mean() < 0.6
    assert torch.allclose(made(2, Step(1, tokens), x).double(), reference(parts, 2, x, wanted), rtol=1e-5, atol=2e-5)


def walk(made: Sum, steps: int = 12) -> list[Tensor]:
    """Rows and columns change, and tokens are rejected now and then."""
    results, past_tokens = [], 0
    for i in range(steps):
        columns = (1, 1, 4, 2)[i % 4]
        for layer in range(3):
            results.append(made(layer, Step(2, columns, past_tokens), rows(2 * columns, seed=100 * layer + i // 2)))
        past_tokens += columns if i % 3 else max(1, columns - 2)
    return results


@pytest.mark.parametrize("window", [0, 1, 4, 8])
@pytest.mark.parametrize("per_cell", [1, 3])
def test_the_window_changes_what_is_read_and_nothing_else(parts: CutModel, window: int, per_cell: int) -> None:
    expected = walk(Sum(parts, lossy(parts.record), window=2, per_cell=2))
    made = Sum(parts, lossy(parts.record), window=window, per_cell=per_cell)
    assert all(map(torch.equal, walk(made), expected))
    assert (made.window.cells_held == 0) == (window == 0)
    assert made.window.cells_held == len(made.source.cells.held)
    made.predicted.idle()
    assert made.window.cells_held == len(made.source.cells.held) == 0


def test_a_wider_window_asks_for_less(parts: CutModel) -> None:
    asked = []
    for window in (0, 1, 4):
        made = Sum(parts, lossy(parts.record), window=window)
        walk(made)
        asked.append(len(made.source.cells.acquired))
    assert asked[0] > asked[1] > asked[2]


@pytest.mark.parametrize("limit", [1, 2, 10, 40, 60, 90])
def test_a_limit_changes_what_is_held_and_nothing_else(parts: CutModel, limit: int) -> None:
    expected = walk(Sum(parts, lossy(parts.record)))
    made = Sum(parts, lossy(parts.record), limit=limit, share=min(limit, 10))
    assert all(map(torch.equal, walk(made), expected))
    assert made.source.cells.held_most <= limit


def test_refused_leases_are_asked_for_again(parts: CutModel) -> None:
    expected = walk(Sum(parts, lossy(parts.record)))
    made = Sum(parts, lossy(parts.record), share=5)
    results = []
    for i in range(0, 36, 3):
        made.source.cells.refusals = i // 3 % 2
        results += walk(made)[i : i + 3]
    assert all(map(torch.equal, results, expected))


def test_a_layer_begins_anew_after_each_loss(parts: CutModel) -> None:
    made, undisturbed = (Sum(parts, lossy(parts.record)) for _ in range(2))
    for i in range(9):
        step, x = Step(2, 1, i // 3), rows(2, seed=i)
        made.source.losses = i % 5
        result = retry_on_loss(made.source, partial(made, i % 3, step, x))
        assert torch.equal(result, undisturbed(i % 3, step, x))
    assert len(made.source.reattached) == sum(i % 5 for i in range(9))
    made.source.losses = 5
    with pytest.raises(DaemonLostError, match="lost 5 times within one layer"):
        retry_on_loss(made.source, partial(made, 0, Step(2, 1, 9), rows(2)))


def test_what_others_let_go_of_is_asked_for_again(parts: CutModel) -> None:
    made = Sum(parts, lossy(parts.record))
    expected = made(0, Step(1, 1), rows(1))
    made.source.idle()
    assert torch.equal(made(0, Step(1, 1, 1), rows(1)), expected)


@pytest.mark.parametrize("tokens", [4, 16, 40])
def test_rows_do_not_depend_on_their_batch_mates(parts: CutModel, tokens: int) -> None:
    made = Sum(parts, lossy(parts.record))
    x = rows(tokens)
    together = made(0, Step(tokens, 1), x)
    for row in (0, tokens - 1):
        assert torch.equal(made(0, Step(1, 1), x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("tokens", [6, 24])
def test_padding_and_finished_rows_want_nothing(parts: CutModel, tokens: int) -> None:
    made = Sum(parts, lossy(parts.record))
    x = rows(tokens)
    wants = np.ones((2, tokens // 2), np.bool_)
    wants[1, :2] = False
    whole, some = made(0, Step(2, tokens // 2), x), made(0, Step(2, tokens // 2, wants=wants), x)
    silent = ~torch.from_numpy(wants.reshape(-1))
    assert not some[silent].any()
    assert torch.equal(some[~silent], whole[~silent])


def test_nothing_is_asked_for_when_no_row_wants_anything(parts: CutModel) -> None:
    made = Sum(parts, lossy(parts.record))
    assert not made(0, Step(2, 1, wants=np.zeros((2, 1), np.bool_)), rows(2)).any()
    assert not made.source.cells.acquired


def test_columns_of_the_prompt_are_exact(parts: CutModel) -> None:
    """Prompt and candidates in one pass: the same bits as the prompt first and the candidates after it."""
    made = Sum(parts, lossy(parts.record))
    x = rows(2 * 25).view(2, 25, HIDDEN)
    y = made(1, Step(2, 25, exact_columns=21), x.reshape(-1, HIDDEN)).view(2, 25, HIDDEN)
    prompt, candidates = x[:, :21].reshape(-1, HIDDEN), x[:, 21:].reshape(-1, HIDDEN)
    assert torch.equal(y[:, :21].reshape(-1, HIDDEN), made(1, Step(2, 21, exact_columns=21), prompt))
    assert torch.equal(y[:, :21].reshape(-1, HIDDEN), made.exact(1, prompt, None))
    assert torch.equal(y[:, 21:].reshape(-1, HIDDEN), made(1, Step(2, 4, 21), candidates))


def test_the_clock_runs(parts: CutModel) -> None:
    made = Sum(parts, lossy(parts.record))
    made(0, Step(1, 1), rows(1))
    clock = made.predicted.clock
    assert min(clock.predict_s, clock.acquire_s, clock.compute_s, clock.wait_s) > 0
