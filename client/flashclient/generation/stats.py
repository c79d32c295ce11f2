"""What one generation did: tokens, bytes and where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from flashclient.model.ffn import Clock
from flashclient.source.bundle_source import BundleSource, Counters
from weightd_proto.modes import KV_PLAIN


@dataclass(frozen=True)
class Stats:
    """Statistics of a client's last generation. A ratio with a denominator of 0 is 0."""

    mode: str = "exact"
    perplexity_loss: float = 0.0  # of the mode, relative, as calibration has measured it; 0 if it was not stored
    rows: int = 0  # sequences returned
    prompt_tokens: int = 0  # of one row, padding included
    kept_tokens: int = 0  # of the prompt: their keys and values were kept from the last turn of a conversation
    new_tokens: int = 0  # of all rows, without the padding of finished ones
    steps: int = 0  # forward passes, including those of guidance and token healing
    drafted_tokens: int = 0  # proposed by an assistant model, prompt lookup or early exit
    accepted_tokens: int = 0  # of the drafted ones
    passes_without_draft: int = 0  # of a generation with drafts: where they cost more than they brought
    seconds: float = 0.0
    first_step_s: float = 0.0  # prefill
    predict_s: float = 0.0
    acquire_s: float = 0.0  # choosing cells to lease, and requesting them
    ffn_s: float = 0.0  # computing FFNs from bundles
    wait_s: float = 0.0  # waiting for bundles
    attention_s: float = 0.0  # the model without its FFNs and head
    head_s: float = 0.0
    draft_s: float = 0.0  # in the assistant model
    hits: int = 0
    misses: int = 0
    read_bytes: int = 0  # from flash, or over the wire
    prefetched: int = 0  # cells read before a router had picked them, by look-ahead
    prefetched_used: int = 0  # those that were picked: hits
    native_layers_share: float = 0.0  # of the decoder layers: attention, norms and sums are one native call
    kv_dtype: str = KV_PLAIN  # of keys and values
    kv_bytes: int = 0  # of all of them at the end, without spare room; 0 where the cache was the caller's own kind

    @property
    def overhead_s(self) -> float:
        """Time for Python, sampling and acquiring: all but prediction, FFNs, waiting, attention, head and drafts."""
        useful_s = self.predict_s + self.ffn_s + self.wait_s + self.attention_s + self.head_s + self.draft_s
        return self.seconds - useful_s

    @property
    def overhead_share(self) -> float:
        return self.overhead_s / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def acceptance(self) -> float:
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

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
        derived = ("overhead_s", "overhead_share", "tokens_per_s", "acceptance", "read_bytes_per_token")
        return asdict(self) | {name: getattr(self, name) for name in (*derived, "read_gb_per_s", "hit_rate")}

    def table(self) -> str:
        """A few lines for a terminal."""
        tokens = f"{self.new_tokens} new, {self.prompt_tokens} of prompt"
        if self.kept_tokens:
            tokens += f" ({self.kept_tokens} kept from the last turn)"
        if self.drafted_tokens:
            tokens += f"; {100 * self.acceptance:.0f} % of {self.drafted_tokens} drafted accepted"
        if self.passes_without_draft:
            tokens += f", {self.passes_without_draft} passes without drafts"
        rows = [
            ("mode", self.mode + (f", {self.perplexity_loss:+.2%} perplexity" if self.perplexity_loss else "")),
            ("tokens", tokens),
            ("speed", f"{self.tokens_per_s:.2f} tokens/s, first after {self.first_step_s:.2f} s"),
            ("read", f"{self.read_bytes_per_token / 1e6:.2f} MB/token, {self.read_gb_per_s:.2f} GB/s"),
            ("hit rate", f"{100 * self.hit_rate:.1f} %"),
            ("layers", f"{100 * self.native_layers_share:.0f} % native"),
            (
                "cache",
                f"{self.kv_bytes / 1e6:.2f} MB of keys and values" + f", {self.kv_dtype}" * (self.kv_dtype != KV_PLAIN),
            ),
            ("time", ", ".join(f"{seconds:.2f} s {name}" for name, seconds in self._times())),
        ]
        return "\n".join(f"{name:<10}{value}" for name, value in rows)

    def _times(self) -> list[tuple[str, float]]:
        times = [("FFN", self.ffn_s), ("waiting for bundles", self.wait_s), ("predicting", self.predict_s)]
        times += [("attention", self.attention_s), ("head", self.head_s), ("drafts", self.draft_s)]
        shown = [(name, seconds) for name, seconds in times if seconds > 0]
        return [*shown, (f"rest ({100 * self.overhead_share:.1f} %)", self.overhead_s)]


class Meter:
    """Measures one generation, from the Meter's construction to finish().

    Attributes:
        inner: number of generations that run inside this one. Their passes draft tokens and check none.
    """

    def __init__(self, source: BundleSource, clock: Clock) -> None:
        self._source, self._clock = source, clock
        self._counters_before: Counters = source.counters()
        self._clock_before = replace(clock)
        self.inner = 0
        self._steps = self._checks = self._columns = 0
        self._first_step_s = self._draft_s = self._draft_began_s = 0.0
        self._started_s = time.perf_counter()

    @property
    def steps(self) -> int:
        """Forward passes so far."""
        return self._steps

    @property
    def checks(self) -> int:
        """Forward passes so far that make tokens."""
        return self._checks

    @contextmanager
    def watching(self, model: torch.nn.Module, assistant: torch.nn.Module | None) -> Iterator[None]:
        """Counts the forward passes of `model`, and measures the time of those of `assistant`."""
        hooks = [model.register_forward_hook(self._step, with_kwargs=True)]
        if assistant is not None and assistant is not model:
            hooks.append(assistant.register_forward_pre_hook(self._begin_draft))
            hooks.append(assistant.register_forward_hook(self._end_draft))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin_draft(self, *_: object) -> None:
        self._draft_began_s = time.perf_counter()

    def _end_draft(self, *_: object) -> None:
        self._draft_s += time.perf_counter() - self._draft_began_s

    def _step(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._steps += 1
        if self._steps == 1:
            self._first_step_s = time.perf_counter() - self._started_s
        if self.inner:
            return
        self._checks += 1
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        self._columns += 0 if inputs is None else inputs.shape[1]

    def finish(
        self,
        *,
        mode: str,
        perplexity_loss: float,
        rows: int,
        prompt_tokens: int,
        kept_tokens: int,
        fed_tokens: int,
        new_tokens: int,
        drafted: bool,
        native_layers_share: float,
        kv_dtype: str,
        kv_bytes: int,
    ) -> Stats:
        """
        Args:
            fed_tokens: tokens of the prompt that were not in a cache.
        """
        seconds = time.perf_counter() - self._started_s
        counted = self._source.counters().since(self._counters_before)
        before, now = asdict(self._clock_before), asdict(self._clock)
        spent = {name: now[name] - before[name] for name in now}
        return Stats(
            mode=mode,
            perplexity_loss=perplexity_loss,
            rows=rows,
            prompt_tokens=prompt_tokens,
            kept_tokens=kept_tokens,
            new_tokens=new_tokens,
            steps=self._steps,
            # each check makes one token itself; it was fed the last token and the drafted ones
            drafted_tokens=max(0, self._columns - fed_tokens - (self._checks - 1)) if drafted else 0,
            accepted_tokens=max(0, new_tokens - self._checks) if drafted else 0,
            seconds=seconds,
            first_step_s=self._first_step_s,
            predict_s=spent["predict_s"],
            acquire_s=spent["acquire_s"],
            ffn_s=spent["compute_s"],
            wait_s=spent["wait_s"],
            attention_s=spent["forward_s"] - spent["ffn_s"] - spent["head_s"],
            head_s=spent["head_s"],
            draft_s=self._draft_s,
            hits=counted.hits,
            misses=counted.misses,
            read_bytes=counted.read_bytes,
            prefetched=counted.prefetched,
            prefetched_used=counted.prefetched_used,
            native_layers_share=native_layers_share,
            kv_dtype=kv_dtype,
            kv_bytes=kv_bytes,
        )
