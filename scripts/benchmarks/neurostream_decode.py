"""neurostream with as much of the weights in memory as is given: forced tokens, the `ids` of a JSON file.

neurostream_task.py runs it as a process, in a memory cgroup: `benchmarks/neurostream_decode.py GGUF PLAN PROMPT_TOKENS
NEW_TOKENS RAM_BYTES BLOCK_ROWS` prints one JSON object, as llama_decode.py does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.pop("GOMP_SPINCOUNT", None)  # as for llama.cpp: flashclient sets it for its own torch

import torch
from neurostream import NeuroStream, api  # type: ignore[import-not-found]
from neurostream.model.qwen3 import KVCache  # type: ignore[import-not-found]
from storage_reads import read_bytes  # type: ignore[import-not-found]

ARENA = "64MB"  # of blocks that are being read


def run(gguf: str, ids: list[int], prompt_tokens: int, new_tokens: int, memory: tuple[int, int]) -> dict[str, Any]:
    """Seconds and bytes read of each token, the prompt first.

    Args:
        memory: bytes of weights that stay in memory, and rows of a block that is read.
    """
    ram_bytes, block_rows = memory
    api.GGUFTokenizer = lambda _: None  # planted files have no vocabulary that it knows, and ids need none
    model = NeuroStream.load(gguf, mem_budget=ARENA, ram_budget=ram_bytes, device="cpu", block_rows=block_rows).model
    told: dict[str, Any] = {"seconds": [], "read_bytes": []}
    steps = [ids[:prompt_tokens], *([one] for one in ids[prompt_tokens : prompt_tokens + new_tokens - 1])]
    cache, position = KVCache(model.cfg.n_layer), 0
    for step in steps:
        before_bytes, started_s = read_bytes(), time.perf_counter()
        with torch.no_grad():
            model.forward(torch.tensor(step), cache, start_pos=position)
        told["seconds"].append(time.perf_counter() - started_s)
        told["read_bytes"].append(read_bytes() - before_bytes)
        position += len(step)
    return told


def main() -> None:
    gguf, plan, *numbers = sys.argv[1:]
    prompt_tokens, new_tokens, ram_bytes, block_rows = map(int, numbers)
    ids = json.loads(Path(plan).read_text())["ids"]
    print(json.dumps(run(gguf, ids, prompt_tokens, new_tokens, (ram_bytes, block_rows))))


if __name__ == "__main__":
    main()
