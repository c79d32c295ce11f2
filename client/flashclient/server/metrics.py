"""Metrics of the server for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

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
        self._registry.register(_KeptFiles(models))
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


class _KeptFiles(Collector):
    """What the files for kept tokens hold and did."""

    def __init__(self, models: Mapping[str, HostedModel]) -> None:
        self._schedulers = {name: model.scheduler for name, model in models.items()}

    def collect(self) -> Iterator[Metric]:
        """Called for each answer of /metrics."""
        used = GaugeMetricFamily("flashclient_kept_file_bytes", "Keys and values kept on flash.", labels=["model"])
        fetched = _count("fetched_tokens", "Tokens of prompts whose keys and values were read from flash.")
        read = _count("file_read_bytes", "Keys and values read from flash.")
        written = _count("file_written_bytes", "Keys and values written to flash.")
        damaged = _count("file_damaged", "Reads of keys and values that failed, hung, or differed from their checksum.")
        for name, scheduler in self._schedulers.items():
            file = scheduler.kept_file
            if file is not None:
                used.add_metric([name], file.used_bytes)
                fetched.add_metric([name], scheduler.fetched_tokens)
                read.add_metric([name], file.read_bytes)
                written.add_metric([name], file.written_bytes)
                damaged.add_metric([name], file.damaged)
        yield from (used, fetched, read, written, damaged)


def _count(name: str, about: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"flashclient_kept_{name}", about, labels=["model"])


def _kept(model: HostedModel) -> float:
    return float(model.scheduler.kept_tokens)


def _load(model: HostedModel, which: int) -> float:
    return float(model.scheduler.load[which])
