"""Metrics of the server for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest

from flashclient.server.hosted_model import Answer, HostedModel


class Metrics:
    """Counts sequences and tokens, and shows what runs and waits."""

    def __init__(self, models: Mapping[str, HostedModel]) -> None:
        self._registry = CollectorRegistry()
        self._sequences = self._counter("sequences", "Sequences that were made, whole or until their client left.")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._kept_tokens = self._counter("kept_prompt_tokens", "Tokens of prompts that were not computed again.")
        self._made_tokens = self._counter("made_tokens", "Tokens that were made.")
        running = Gauge("flashclient_running", "Sequences that advance.", ["model"], registry=self._registry)
        waiting = Gauge("flashclient_waiting", "Sequences that wait.", ["model"], registry=self._registry)
        kept = Gauge("flashclient_kept", "Tokens kept for later prompts.", ["model"], registry=self._registry)
        for name, model in models.items():
            kept.labels(name).set_function(partial(_kept, model))
            running.labels(name).set_function(partial(_load, model, 0))
            waiting.labels(name).set_function(partial(_load, model, 1))

    def count(self, answer: Answer) -> None:
        """Counts a sequence that has ended."""
        self._sequences.inc()
        self._prompt_tokens.inc(answer.prompt_tokens)
        self._kept_tokens.inc(answer.request.kept_tokens)
        self._made_tokens.inc(answer.request.made)

    def text(self) -> tuple[str, str]:
        """What /metrics answers, and its media type."""
        return generate_latest(self._registry).decode(), CONTENT_TYPE_LATEST

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(f"flashclient_{name}", about, registry=self._registry)


def _kept(model: HostedModel) -> float:
    return float(model.scheduler.kept_tokens)


def _load(model: HostedModel, which: int) -> float:
    return float(model.scheduler.load[which])
