"""What one generation did: tokens, bytes and where the time went."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from flashclient.ffn import Clock
from flashclient.source import BundleSource, Counters


@dataclass(frozen=True)
class Stats:
    """Of the last generation of a client. Ratios of nothing are 0."""

    rows: int = 0
    prompt_tokens: int = 0  # of a row, padding included
    new_tokens: int = 0  # of all rows
    steps: int = 0  # forward passes
    seconds: float = 0.0
    first_step_s: float = 0.0  # prefill
    ffn_s: float = 0.0  # computing on bundles
    wait_s: float = 0.0  # waiting for bundles
    hits: int = 0
    misses: int = 0
    read_bytes: int = 0  # from flash, or over the wire

    @property
    def rest_s(self) -> float:
        """Attention, head, sampling, Python."""
        return self.seconds - self.ffn_s - self.wait_s

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def read_bytes_per_token(self) -> float:
        return self.read_bytes / self.new_tokens if self.new_tokens else 0.0

    @property
    def read_gb_per_s(self) -> float:
        return self.read_bytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def hit_rate(self) -> float:
        wanted = self.hits + self.misses
        return self.hits / wanted if wanted else 0.0

    def as_dict(self) -> dict[str, Any]:
        derived = ("rest_s", "tokens_per_s", "read_bytes_per_token", "read_gb_per_s", "hit_rate")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    def table(self) -> str:
        """A few lines for a terminal."""
        rows = [
            ("tokens", f"{self.new_tokens} new, {self.prompt_tokens} of prompt"),
            ("speed", f"{self.tokens_per_s:.2f} tokens/s, first after {self.first_step_s:.2f} s"),
            ("read", f"{self.read_bytes_per_token / 1e6:.2f} MB/token, {self.read_gb_per_s:.2f} GB/s"),
            ("hit rate", f"{100 * self.hit_rate:.1f} %"),
            ("time", f"{self.ffn_s:.2f} s FFN, {self.wait_s:.2f} s waiting for bundles, {self.rest_s:.2f} s rest"),
        ]
        return "\n".join(f"{name:<10}{value}" for name, value in rows)


class Meter:
    """Measures one generation from its construction to finish()."""

    def __init__(self, source: BundleSource, clock: Clock) -> None:
        self._source, self._clock = source, clock
        self._counters_before: Counters = source.counters()
        self._ffn_before_s, self._wait_before_s = clock.compute_s, clock.wait_s
        self._steps = 0
        self._first_step_s = 0.0
        self._started_s = time.perf_counter()

    def step(self, *_: object) -> None:
        """A forward pass has ended; a forward hook of the model calls it."""
        self._steps += 1
        if self._steps == 1:
            self._first_step_s = time.perf_counter() - self._started_s

    def finish(self, *, rows: int, prompt_tokens: int, new_tokens: int) -> Stats:
        seconds = time.perf_counter() - self._started_s
        counted = self._source.counters().since(self._counters_before)
        return Stats(
            rows=rows,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            steps=self._steps,
            seconds=seconds,
            first_step_s=self._first_step_s,
            ffn_s=self._clock.compute_s - self._ffn_before_s,
            wait_s=self._clock.wait_s - self._wait_before_s,
            hits=counted.hits,
            misses=counted.misses,
            read_bytes=counted.read_bytes,
        )
