"""Stops drafting where it loses: what a token costs with drafts and without is measured while a text is made.

A pass that checks drafted tokens is worth it if the tokens that it makes take less time than as many passes without a
draft, the draft's own time included. That depends on the text, and on what a pass reads, so no setting is right always.
The way that costs more is tried again from time to time, for a few passes, and less and less often.

Greedy texts are the same with drafts and without, so time may decide. With sampling it may not: drafts change which
random numbers are used, and a seed must give the same text again. There the number of accepted tokens decides.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

TRIED_PASSES = 3  # of one way, before it is judged; the first is not measured, because the draft has to catch up
FIRST_STAY_PASSES = 24  # with the better way, before the other is tried again
STAY_PASSES_MAX = 384
MEASURED_PASSES = 8  # of each way: the last ones count
DRAFT_TOKENS_LEAST = 64  # that a pass is taken to draft; schedules of transformers' change the number
DRAFT_LENGTHS = ("num_assistant_tokens", "num_output_tokens")  # of transformers' two kinds of drafts
ACCEPTED_LEAST = 1.0  # tokens of a pass, on average, for which sampling goes on with drafts


class DraftWatch:
    """Whether each pass of one generation drafts.

    Args:
        timed: time decides, else the number of accepted tokens.
    """

    def __init__(self, timed: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self._timed, self._clock = timed, clock
        self._passes: dict[bool, deque[tuple[float, int]]] = {
            drafting: deque(maxlen=MEASURED_PASSES) for drafting in (True, False)
        }  # seconds and tokens of the last passes with and without drafts
        self._drafting = True
        self._left = TRIED_PASSES + 1  # passes until the next decision; the first one computes the prompt
        self._trying = True
        self._fresh = True  # the next pass is the first of its way
        self._stay_passes = FIRST_STAY_PASSES
        self._began_s = 0.0
        self._length: int | None = None  # of the text when the last pass began
        self.passes_without = 0

    def drafts(self, length: int) -> bool:
        """Whether the pass drafts that begins now, with a text of `length` tokens."""
        now_s = self._clock()
        if self._length is not None:
            self._note(now_s - self._began_s, length - self._length)
        self._began_s, self._length = now_s, length
        self.passes_without += not self._drafting
        return self._drafting

    def _note(self, seconds: float, tokens: int) -> None:
        if not self._fresh:
            self._passes[self._drafting].append((seconds, tokens))
        self._fresh = False
        self._left -= 1
        if self._left == 0:
            self._decide()

    def _decide(self) -> None:
        """After a trial: goes on with the better way. After a stay: tries the other one."""
        if self._trying and self._passes[not self._drafting]:
            better = self._better()
            self._stay_passes = (
                min(2 * self._stay_passes, STAY_PASSES_MAX) if better != self._drafting else FIRST_STAY_PASSES
            )
            self._change(better, self._stay_passes, trying=False)
        elif self._trying and not self._timed and self._better():
            self._change(True, FIRST_STAY_PASSES, trying=False)
        else:
            self._change(not self._drafting, TRIED_PASSES, trying=True)

    def _change(self, drafting: bool, passes: int, trying: bool) -> None:
        self._fresh = drafting != self._drafting
        self._drafting, self._left, self._trying = drafting, passes, trying

    def _better(self) -> bool:
        """Whether drafts are better."""
        if not self._timed:
            drafted = self._passes[True]
            return sum(tokens - 1 for _, tokens in drafted) >= ACCEPTED_LEAST * len(drafted)
        with_drafts, without = (
            sum(seconds for seconds, _ in passes) / sum(tokens for _, tokens in passes)
            for passes in (self._passes[True], self._passes[False])
        )
        return with_drafts <= without


@contextmanager
def watched(model: Any, watch: DraftWatch, is_long: Callable[[int], bool]) -> Iterator[None]:
    """Inside the `with` statement, `model.generate()` drafts only in passes in which `watch` says so.

    Args:
        is_long: whether so many tokens rotate by long factors. A text that becomes long is not drafted any more before
            it does: its drafts would rotate its tokens, and transformers' Phi-3 as a draft fails there.
    """
    candidate_generator = model._get_candidate_generator

    def watched_generator(*positional: Any, **named: Any) -> Any:
        generator = candidate_generator(*positional, **named)
        if not getattr(generator, "requires_model_outputs", False):
            _watch(generator, watch, is_long)
        return generator

    model._get_candidate_generator = watched_generator
    try:
        yield
    finally:
        del model._get_candidate_generator


def _watch(generator: Any, watch: DraftWatch, is_long: Callable[[int], bool]) -> None:
    get, update = generator.get_candidates, generator.update_candidate_strategy
    drafted = True
    began_long: bool | None = None

    def get_candidates(input_ids: Any, *positional: Any, **named: Any) -> Any:
        nonlocal drafted, began_long
        length = input_ids.shape[1]
        began_long = is_long(length) if began_long is None else began_long
        most = max(DRAFT_TOKENS_LEAST, *(getattr(generator, name, None) or 0 for name in DRAFT_LENGTHS))
        drafted = watch.drafts(length) and is_long(length + most) == began_long
        return get(input_ids, *positional, **named) if drafted else (input_ids, None)

    def update_candidate_strategy(*positional: Any, **named: Any) -> None:
        if drafted:
            # From these transformers would learn how sure a draft must be, and import scikit-learn: that takes seconds.
            for noted in (getattr(generator, "probs", []), getattr(generator, "matches", [])):
                noted.clear()
            update(*positional, **named)

    generator.get_candidates, generator.update_candidate_strategy = get_candidates, update_candidate_strategy
