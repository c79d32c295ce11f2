"""A model in memory that decodes on request, so that several can take turns in one run.

`benchmarks/decode_worker.py '{"kind": "weightd", ...}'` loads a model (the fields of Model), says that it is ready, and
then answers each line of its standard input, a JSON object, with another: the seconds of each of the `steps`. A step
is the token ids that a forward pass takes: a prompt of some tokens begins anew, a single id continues. With
`times_kernels` weightd's client tells the seconds in kernels, too.
"""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import flashclient  # before torch, so that torch's idle threads do not spin

# isort: split
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

from flashclient import _native
from flashclient.daemon.channel import Connection
from flashclient.kernels.growing_cache import GrowingCache

TIMEOUT_S = 600.0
KERNELS = (  # native calls that compute, on all threads
    ("AttentionBlocks", "compute"), ("AttentionBlocks", "finish"), ("AttentionInputs", "compute"),
    ("Attention", "attend"), ("Linear", "project"), ("Norms", "apply"),
    ("Ffn", "add_rows"), ("Ffn", "fire"), ("Ffn", "accumulate"),
)  # fmt: skip
STEPS = (
    "PredictStep",
    "ExpertStep",
)  # native calls that tell the seconds that they predicted, acquired, computed, waited


@dataclass(frozen=True)
class Model:
    """A model to load.

    Attributes:
        kind: weightd or transformers.
        source: the address of a weightd, or a checkpoint.
        name: of the model in weightd.
        options: of FlashClient, or of from_pretrained().
    """

    kind: str
    source: str
    name: str
    threads: int
    options: dict[str, Any]


class Decoder(ABC):
    """A loaded model."""

    model: Any

    @abstractmethod
    def new_cache(self) -> Any:
        """An empty cache."""

    def run(self, steps: list[list[int]]) -> dict[str, Any]:
        """The seconds of each step, and what counters say of all of them."""
        before, seconds = self.counters(), []
        with torch.no_grad():
            for ids in steps:
                if len(ids) > 1:
                    self._cache = self.new_cache()
                    self.begin(len(ids))
                started_s = time.perf_counter()
                logits = self.model(torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
                logits.logits.argmax()
                seconds.append(time.perf_counter() - started_s)
        after = self.counters()
        return {"seconds": seconds} | {name: after[name] - before[name] for name in after}

    def begin(self, prompt_tokens: int) -> None:
        """Called before a prompt of so many tokens."""
        return

    def counters(self) -> dict[str, float]:
        return {}

    def timing_kernels(self) -> AbstractContextManager[object]:
        """While counters() counts the seconds in kernels."""
        return nullcontext()


class Weightd(Decoder):
    """A FlashClient. Its kernels are timed from outside, which costs some microseconds of each call."""

    def __init__(self, given: Model) -> None:
        self._kernel_s = 0.0
        self._client = flashclient.FlashClient(given.name, address=given.source, timeout_s=TIMEOUT_S, **given.options)
        self._connection = Connection(given.source, TIMEOUT_S)
        self._generating = False
        self.model = self._client.model

    def new_cache(self) -> Any:
        return GrowingCache(self.model.config)

    def counters(self) -> dict[str, float]:
        messages = sum(session.requests for session in self._connection.stats().attached)
        return {"kernel_s": self._kernel_s, "messages": float(messages)}

    def begin(self, prompt_tokens: int) -> None:
        """As a generation does: predict mode computes its prompt exactly."""
        steps = self._client.loaded.built.steps
        if steps is None:
            return
        if self._generating:
            steps.end()
        steps.begin(prompt_tokens, None)
        self._generating = True

    @contextmanager
    def timing_kernels(self) -> Iterator[None]:
        timed = [(getattr(_native, kind), method, self._timed) for kind, method in KERNELS]
        timed += [(getattr(_native, kind), "run", self._timed_step) for kind in STEPS]
        timed += [(_native.LayerCalls, "run", self._timed_layers)]
        plain = [getattr(kind, method) for kind, method, _ in timed]
        for (kind, method, wrapped), call in zip(timed, plain, strict=True):
            setattr(kind, method, wrapped(call))
        try:
            yield
        finally:
            for (kind, method, _), call in zip(timed, plain, strict=True):
                setattr(kind, method, call)

    def _timed(self, call: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            started_s = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self._kernel_s += time.perf_counter() - started_s

        return timed

    def _timed_layers(self, call: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            started_s = time.perf_counter()
            layers = call(*arguments)
            self._kernel_s += time.perf_counter() - started_s
            self._kernel_s -= sum(acquire_s + wait_s for _, acquire_s, _, wait_s in layers)
            return layers

        return timed

    def _timed_step(self, call: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            predict_s, acquire_s, compute_s, wait_s = call(*arguments)
            self._kernel_s += predict_s + compute_s
            return predict_s, acquire_s, compute_s, wait_s

        return timed


class Transformers(Decoder):
    """transformers' own model, in the dtype of the checkpoint."""

    def __init__(self, given: Model) -> None:
        disable_progress_bar()  # type: ignore[no-untyped-call]
        options = {"dtype": "auto"} | given.options
        self.model = AutoModelForCausalLM.from_pretrained(given.source, **options).eval()  # type: ignore[no-untyped-call]

    def new_cache(self) -> Any:
        return DynamicCache(config=self.model.config)


def main() -> None:
    given = Model(**json.loads(sys.argv[1]))
    torch.set_num_threads(given.threads)
    decoder: Decoder = Weightd(given) if given.kind == "weightd" else Transformers(given)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        with decoder.timing_kernels() if asked["times_kernels"] else nullcontext():
            told = decoder.run(asked["steps"])
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
