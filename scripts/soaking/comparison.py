"""Compares the time of a token of honest clients with and without hostile ones, in turns within one run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

Kind = tuple[str, str, str]  # model, mode, transport

TURNS = (False, True, True, False)  # with hostile clients or not; a slow drift affects both alike
SETTLE_S = 2.0  # after a change, while connections are opened or closed
SLOWER_MAX = 2.0  # ratio of the 99th percentiles
TOKENS_MIN = 200  # of a kind, with and without: fewer give no meaningful 99th percentile


@dataclass
class Comparison:
    """Times of tokens by kind of client, without and with hostile clients."""

    times_s: dict[Kind, tuple[list[float], list[float]]] = field(default_factory=lambda: defaultdict(lambda: ([], [])))
    hostile: bool | None = None  # None: between two turns
    since_s: float = 0.0  # of this turn
    tokens_before: dict[Kind, int] = field(default_factory=dict)  # this turn

    def begin(self, hostile: bool) -> None:
        self.hostile, self.since_s = hostile, time.monotonic()
        self.tokens_before = {kind: len(times[hostile]) for kind, times in self.times_s.items()}

    def has_enough(self, kinds: Sequence[Kind]) -> bool:
        """Whether this turn has half of the tokens that a kind needs: there are two turns."""
        assert self.hostile is not None
        counts = (len(self.times_s[kind][self.hostile]) - self.tokens_before.get(kind, 0) for kind in kinds)
        return min(counts) >= TOKENS_MIN / 2

    def end(self) -> None:
        self.hostile = None

    def take(self, kind: Kind, began_s: float, made_s: Sequence[float]) -> None:
        """Counts the tokens of a generation that has ended, if all of it lies within one turn."""
        if self.hostile is not None and began_s >= self.since_s:
            self.times_s[kind][self.hostile].extend(made_s)

    def rows(self) -> list[dict[str, object]]:
        return [
            {
                "client": " ".join(kind),
                "tokens": [len(times) for times in both],
                "p50_ms": [round(1000 * percentile(times, 0.5), 2) for times in both],
                "p99_ms": [round(1000 * percentile(times, 0.99), 2) for times in both],
                "slower": round(self.slower(kind), 2),
            }
            for kind, both in sorted(self.times_s.items())
            if all(both)
        ]

    def slower(self, kind: Kind) -> float:
        """The 99th percentile with hostile clients, divided by the one without."""
        quiet, hostile = self.times_s[kind]
        return percentile(hostile, 0.99) / percentile(quiet, 0.99)

    def wrong(self, kinds: Sequence[Kind]) -> list[str]:
        """A line for each result that is wrong."""
        lines = []
        for kind in kinds:
            if min(map(len, self.times_s[kind])) < TOKENS_MIN:
                lines.append(
                    f"{kind}: only {list(map(len, self.times_s[kind]))} tokens without and with hostile clients"
                )
            elif self.slower(kind) > SLOWER_MAX:
                lines.append(
                    f"{kind}: hostile clients make the slowest hundredth of tokens {self.slower(kind):.1f} x slower"
                )
        return lines


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
