"""How long honest clients take for a token, with hostile ones beside them and without, in turns within one run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

Kind = tuple[str, str, str]  # model, mode, transport

TURNS = (False, True, True, False)  # hostile or not: what drifts by the minute falls on both
SETTLE_S = 2.0  # after a change: connections are made, or found to have gone
SLOWER_MAX = 2.0  # of the 99th percentile
TOKENS_MIN = 200  # of a kind in both states, for a 99th percentile to mean anything


@dataclass
class Comparison:
    """Times of tokens by kind of client, without and with hostile clients."""

    times_s: dict[Kind, tuple[list[float], list[float]]] = field(default_factory=lambda: defaultdict(lambda: ([], [])))
    hostile: bool | None = None  # None: between two turns
    since_s: float = 0.0  # of this turn

    def begin(self, hostile: bool) -> None:
        self.hostile, self.since_s = hostile, time.monotonic()

    def end(self) -> None:
        self.hostile = None

    def take(self, kind: Kind, began_s: float, made_s: Sequence[float]) -> None:
        """The tokens of a generation that has just ended; only of one that lies within a turn."""
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
        """The 99th percentile with hostile clients, of that without."""
        quiet, hostile = self.times_s[kind]
        return percentile(hostile, 0.99) / percentile(quiet, 0.99)

    def wrong(self, kinds: Sequence[Kind]) -> list[str]:
        """What must not be."""
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
