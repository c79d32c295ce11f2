"""The alternatives: transformers with the whole model in memory, or offloaded to disk by accelerate.

bench_paper runs it as a process, in a memory cgroup if both sides must have the same memory:
`paper/peers.py dense|accelerate CHECKPOINT PROMPT_TOKENS NEW_TOKENS SEED MEMORY_BYTES`, prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("GOMP_SPINCOUNT", None)  # flashclient sets it in the bench; a peer that runs alone is faster without it

import torch
from benchmarks.forced_tokens import ForcedTokens, random_ids
from transformers import AutoModelForCausalLM
from transformers.utils import logging

BESIDE_WEIGHTS_BYTES = 700 << 20  # interpreter, torch, activations and the layer that is being loaded


def load(kind: str, checkpoint: Path, memory_bytes: int, folder: str) -> Any:
    """The model in the checkpoint's dtype."""
    loader: Any = AutoModelForCausalLM
    if kind == "dense":
        return loader.from_pretrained(checkpoint, dtype="auto")
    kept_bytes = max(0, memory_bytes - BESIDE_WEIGHTS_BYTES)
    return loader.from_pretrained(
        checkpoint, dtype="auto", device_map="auto", max_memory={"cpu": kept_bytes}, offload_folder=folder
    )


def run(kind: str, checkpoint: Path, prompt_tokens: int, new_tokens: int, seed: int, memory_bytes: int) -> list[float]:
    """Seconds of each token, the prompt first."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory(prefix="offloaded-", dir=checkpoint.parent) as folder:
        model = load(kind, checkpoint, memory_bytes, folder)
        vocabulary = model.config.vocab_size
        forced = ForcedTokens(random_ids(vocabulary, new_tokens, seed + 1))
        prompt = torch.tensor([random_ids(vocabulary, prompt_tokens, seed)])
        forced.start()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            logits_processor=[forced],
        )
    return forced.seconds


def main() -> int:
    kind, checkpoint, *numbers = sys.argv[1:]
    prompt_tokens, new_tokens, seed, memory_bytes = map(int, numbers)
    print(json.dumps(run(kind, Path(checkpoint), prompt_tokens, new_tokens, seed, memory_bytes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
