"""A model in memory that decodes on request, so that several can take turns in one run.

`benchmarks/decode_worker.py '{"kind": "weightd", ...}'` loads a model (the fields of Model), says that it is ready, and
then answers each line of its standard input, a JSON list of token ids or of lists of them, with one JSON object: the
seconds of each step. A step is what a forward pass takes: a prompt of some tokens begins anew, a single id continues.
"""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import flashclient  # before torch, so that torch's idle threads do not spin

# isort: split
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from flashclient import _native
from flashclient.daemon.channel import Connection
from flashclient.kernels.growing_cache import GrowingCache

TIMEOUT_S = 600.0
KERNELS = (  # native calls that compute, on all threads
    ("AttentionBlocks", "compute"), ("AttentionBlocks", "finish"), ("AttentionInputs", "compute"),
    ("Attention", "attend"), ("Linear", "project"), ("Norms", "apply"),
    ("Ffn", "add_rows"), ("Ffn", "fire"), ("Ffn", "accumulate"),
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model to load.

    Attributes:
        kind: weightd or transformers.
        source: the address of a weightd, or a checkpoint.
        name: of the model in weightd.
        options: of FlashClient.
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
                started_s = time.perf_counter()
                logits = self.model(torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
                logits.logits.argmax()
                seconds.append(time.perf_counter() - started_s)
        after = self.counters()
        return {"seconds": seconds} | {name: after[name] - before[name] for name in after}

    def counters(self) -> dict[str, float]:
        return {}


class Weightd(Decoder):
    """A FlashClient. Its kernels are timed from outside, which costs some microseconds of each call."""

    def __init__(self, given: Model) -> None:
        self._kernel_s = 0.0
        for kind, method in KERNELS:
            self._time(getattr(_native, kind), method)
        self._client = flashclient.FlashClient(given.name, address=given.source, timeout_s=TIMEOUT_S, **given.options)
        self._connection = Connection(given.source, TIMEOUT_S)
        self.model = self._client.model

    def new_cache(self) -> Any:
        return GrowingCache(self.model.config)

    def counters(self) -> dict[str, float]:
        messages = sum(session.requests for session in self._connection.stats().attached)
        return {"kernel_s": self._kernel_s, "messages": float(messages)}

    def _time(self, kind: Any, method: str) -> None:
        plain = getattr(kind, method)

        def timed(*arguments: Any) -> Any:
            started_s = time.perf_counter()
            try:
                return plain(*arguments)
            finally:
                self._kernel_s += time.perf_counter() - started_s

        setattr(kind, method, timed)


class Transformers(Decoder):
    """transformers' own model, in the dtype of the checkpoint."""

    def __init__(self, given: Model) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(given.source, dtype="auto").eval()  # type: ignore[no-untyped-call]

    def new_cache(self) -> Any:
        return DynamicCache(config=self.model.config)


def main() -> None:
    given = Model(**json.loads(sys.argv[1]))
    torch.set_num_threads(given.threads)
    decoder: Decoder = Weightd(given) if given.kind == "weightd" else Transformers(given)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(decoder.run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
