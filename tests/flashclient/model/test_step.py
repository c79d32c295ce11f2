"""What a forward pass tells the FFNs: through the hook of a real model, as transformers' generate() calls it."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_config, make_model

from flashclient.model.step import Step, Steps


class Watched:
    """A dense model that records the steps of its forward passes."""

    def __init__(self, family: str) -> None:
        self.model: Any = make_model(make_config(family))
        self.model.generation_config.eos_token_id = None
        self.let_go = 0
        self.steps = Steps(list(inspect.signature(self.model.forward).parameters), self._let_go)
        self.seen: list[Step] = []
        self.model.register_forward_pre_hook(self.steps.publish, with_kwargs=True)
        self.model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _let_go(self) -> None:
        self.let_go += 1

    def _look(self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.seen.append(self.steps.current(inputs.numel()))

    def generate(self, ids: list[list[int]], end_tokens: list[int] | None = None, **arguments: Any) -> torch.Tensor:
        prompt = torch.tensor(ids)
        self.steps.begin(prompt.shape[1], end_tokens)
        sequences: torch.Tensor = self.model.generate(
            prompt, do_sample=False, **{"attention_mask": torch.ones_like(prompt)} | arguments
        )
        self.steps.end()
        return sequences


@pytest.fixture(params=["opt", "gemma3"])
def watched(request: pytest.FixtureRequest) -> Watched:
    return Watched(request.param)


def shapes(seen: list[Step]) -> list[tuple[int, int, int, int]]:
    return [(step.rows, step.columns, step.past_tokens, step.exact_columns) for step in seen]


def test_the_prompt_is_exact_and_what_follows_is_not(watched: Watched) -> None:
    watched.generate([[5, 6, 7]], max_new_tokens=3)
    assert shapes(watched.seen) == [(1, 3, 0, 3), (1, 1, 3, 0), (1, 1, 4, 0)]
    assert watched.let_go == 0


def test_without_a_cache_the_prompt_stays_exact(watched: Watched) -> None:
    watched.generate([[5, 6, 7]], max_new_tokens=3, use_cache=False)
    assert shapes(watched.seen) == [(1, 3, 0, 3), (1, 4, 0, 3), (1, 5, 0, 3)]
    assert watched.seen[1].predicted() == Step(1, 1, 3, 0)


def test_beams_are_rows(watched: Watched) -> None:
    watched.generate([[5, 6, 7]], max_new_tokens=2, num_beams=3)
    assert [step.rows for step in watched.seen] == [3, 3]


def test_padding_wants_nothing(watched: Watched) -> None:
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    watched.generate([[5, 6, 7], [0, 0, 8]], attention_mask=mask, max_new_tokens=2)
    assert watched.seen[0].wants is not None
    assert watched.seen[0].wants.tolist() == mask.bool().tolist()
    assert watched.seen[1].wants is None


def test_a_finished_row_wants_nothing_from_its_end_on(watched: Watched) -> None:
    free = watched.generate([[5, 6, 7], [9, 8, 200]], max_new_tokens=6)
    watched.seen.clear()
    end = int(free[0, 4])
    made = watched.generate([[5, 6, 7], [9, 8, 200]], [end], max_new_tokens=6, eos_token_id=end, pad_token_id=0)
    ended = [(row == end).cumsum(0) > 0 for row in made[:, 3:]]  # [rows, new tokens]
    for column, step in enumerate(watched.seen[1:]):
        finished = [bool(row[column]) for row in ended]
        assert (step.wants is None) == (not any(finished))
        if step.wants is not None:
            assert step.wants[:, 0].tolist() == [not one for one in finished]
    assert any(step.wants is not None for step in watched.seen)


def test_an_end_token_of_the_prompt_finishes_nothing(watched: Watched) -> None:
    watched.generate([[5, 77, 7]], [77], max_new_tokens=2, use_cache=False)
    assert [step.wants for step in watched.seen] == [None, None]


def test_rejected_tokens_show_in_the_cache(watched: Watched) -> None:
    draft: Any = make_model(make_config("opt", layers=1), seed=5)
    draft.generation_config.num_assistant_tokens = 3
    draft.generation_config.assistant_confidence_threshold = 0.0
    watched.generate([[5, 6, 7]], max_new_tokens=10, assistant_model=draft)
    first, *others = watched.seen
    assert (first.past_tokens, first.exact_columns) == (0, 3)
    assert first.columns > 3
    assert first.predicted().past_tokens == 3
    ends = [step.past_tokens + step.columns for step in watched.seen]
    assert any(step.past_tokens < end for step, end in zip(others, ends, strict=False)), "nothing was rejected"
    assert {step.exact_columns for step in others} == {0}


def test_outside_a_generation_all_is_predicted(watched: Watched) -> None:
    with torch.no_grad():
        out = watched.model(torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 1]]))
        watched.model(torch.tensor([[8]]), past_key_values=out.past_key_values)
    assert shapes(watched.seen) == [(1, 3, 0, 0), (1, 1, 3, 0)]
    assert watched.seen[0].wants is not None
    assert watched.let_go == 1, "a sequence that begins has no past"


def test_an_ffn_that_is_called_on_its_own_has_a_sequence_of_rows(watched: Watched) -> None:
    assert watched.steps.current(5) == Step(1, 5)
    watched.generate([[5, 6, 7]], max_new_tokens=1)
    assert watched.steps.current(8) == Step(1, 8)


def test_row_masks() -> None:
    assert Step(2, 3).row_masks().tolist() == [0b111111]
    assert Step(1, 16).row_masks().tolist() == [0xFFFF]
    assert Step(6, 3).row_masks().tolist() == [0xFFFF, 0b11]
    assert Step(2, 2, wants=np.array([[False, True], [True, True]])).row_masks().tolist() == [0b1110]
