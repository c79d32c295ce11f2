"""Drafting stops where it loses, goes on where it wins, and never changes a greedy text."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from flashclient.generation.draft_watch import FIRST_STAY_PASSES, TRIED_PASSES, DraftWatch, watched

DRAFT_S, CHECK_S = 1.0, 1.0


def run(tokens: int, cost_s: Callable[[bool, int], float], accepted: Callable[[int], int], timed: bool) -> list[bool]:
    """Whether each pass of a text of `tokens` tokens drafted. `cost_s`: of a pass that begins at that length."""
    now_s = 0.0
    watch = DraftWatch(timed, lambda: now_s)
    length, decisions = 10, []
    while length < 10 + tokens:
        drafting = watch.drafts(length)
        decisions.append(drafting)
        now_s += cost_s(drafting, length)
        length += 1 + (accepted(length) if drafting else 0)
    return decisions


@pytest.mark.parametrize("timed", [True, False])
def test_drafts_that_are_wrong_stop(timed: bool) -> None:
    decisions = run(2000, lambda drafting, _: CHECK_S + drafting * DRAFT_S, lambda _: 0, timed)
    assert sum(decisions) / len(decisions) < 0.03
    assert not any(decisions[TRIED_PASSES + 1 : FIRST_STAY_PASSES])


@pytest.mark.parametrize("timed", [True, False])
def test_drafts_that_are_right_go_on(timed: bool) -> None:
    decisions = run(2000, lambda drafting, _: CHECK_S + drafting * DRAFT_S, lambda _: 4, timed)
    assert sum(decisions) / len(decisions) > 0.9


def test_drafts_that_are_right_but_cost_more_stop() -> None:
    decisions = run(2000, lambda drafting, _: CHECK_S + drafting * 9, lambda _: 4, timed=True)
    assert sum(decisions) / len(decisions) < 0.05


@pytest.mark.parametrize("timed", [True, False])
def test_they_come_back_when_the_text_changes(timed: bool) -> None:
    decisions = run(
        3000, lambda drafting, _: CHECK_S + drafting * DRAFT_S, lambda length: 4 if length > 500 else 0, timed
    )
    assert sum(decisions[-100:]) > 80


def test_with_sampling_time_decides_nothing() -> None:
    def decisions(draft_s: float) -> list[bool]:
        return run(500, lambda drafting, length: 1 + drafting * draft_s + length % 3, lambda length: length % 4, False)

    assert decisions(0.0) == decisions(100.0)


def test_transformers_learns_no_threshold_for_which_it_would_import_scikit_learn() -> None:
    seen: list[int] = []

    class Generator:
        def __init__(self) -> None:
            self.probs, self.matches = [0.5] * 9, [1, 0] * 4

        def get_candidates(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, None]:
            return input_ids, None

        def update_candidate_strategy(self, num_matches: int) -> None:
            self.matches.extend([1] * num_matches)
            seen.append(len(self.probs))

    model = SimpleNamespace(_get_candidate_generator=Generator)
    with watched(model, DraftWatch(timed=True), lambda tokens: False):
        generator = model._get_candidate_generator()
        generator.get_candidates(torch.ones(1, 4))
        generator.update_candidate_strategy(num_matches=2)
    assert seen == [0]  # it needs six
