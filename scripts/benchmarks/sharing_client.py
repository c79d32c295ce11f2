"""One of several processes that decode the same tokens at the same time; run by bench_sharing.

`sharing_client.py '{"address": ..., ...}'` (the fields of Task) prints a line when it is ready, decodes after a line on
standard input, prints its times, and keeps all its memory until standard input ends. Without an address it only loads
the libraries, to show the memory of a process without a model.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import flashclient  # before torch, so that torch's idle threads do not spin

# isort: split
import torch
from torch import Tensor
from transformers import OPTForCausalLM

from benchmarks.forced_tokens import ForcedTokens, random_ids
from flashclient.errors import FlashClientError

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Task:
    """The work of one client."""

    address: str | None
    model: str
    mode: str
    prompt_tokens: int
    new_tokens: int
    seed: int


class Digest(ForcedTokens):
    """Forced tokens, and a digest of what the model would have said: equal for equal results."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__(ids)
        self._hash = hashlib.sha256()

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        self._hash.update(scores.float().numpy().tobytes())
        return super().__call__(input_ids, scores)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def decode(client: flashclient.FlashClient, task: Task) -> dict[str, Any]:
    """Seconds of each token, the prompt first, and the digest of all logits."""
    vocabulary = client.model.config.vocab_size
    prompt = torch.tensor([random_ids(vocabulary, task.prompt_tokens, task.seed)])
    forced = Digest(random_ids(vocabulary, task.new_tokens, task.seed + 1))
    started_s = time.perf_counter()
    forced.start()
    client.generate(prompt, max_new_tokens=task.new_tokens, do_sample=False, logits_processor=[forced])
    return {"seconds": forced.seconds, "all_s": time.perf_counter() - started_s, "digest": forced.hexdigest()}


def tell(what: Any) -> None:
    print(json.dumps(what), flush=True)


def main() -> int:
    task = Task(**json.loads(sys.argv[1]))
    if task.address is None:
        tell({"loaded": [OPTForCausalLM.__name__]})
        sys.stdin.read()
        return 0
    try:
        options: dict[str, Any] = {"mode": task.mode, "timeout_s": TIMEOUT_S}
        with flashclient.FlashClient(task.model, address=task.address, **options) as client:
            tell({"ready": True})
            sys.stdin.readline()
            tell(decode(client, task))
            sys.stdin.read()
    except FlashClientError as error:
        print(f"sharing_client: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
