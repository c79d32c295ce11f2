"""llama.cpp with its file mapped into memory: forced tokens, the `ids` of a JSON file.

llama.py runs it as a process, in a memory cgroup and with an interpreter that has llama-cpp-python:
`benchmarks/llama_decode.py GGUF PLAN PROMPT_TOKENS NEW_TOKENS THREADS` prints one JSON object. It imports nothing of
this project.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.pop("GOMP_SPINCOUNT", None)  # flashclient sets it for torch in the bench; llama.cpp is faster without it
import llama_cpp  # type: ignore[import-not-found]
from storage_reads import read_bytes  # type: ignore[import-not-found]


def map_weights() -> None:
    """Lets llama.cpp compute on the mapped file. It would repack quantised weights, into memory that they fill."""
    params = llama_cpp.llama_cpp.llama_model_default_params

    def of_mapped_weights() -> Any:
        made = params()
        made.use_extra_bufts = False
        return made

    llama_cpp.llama_cpp.llama_model_default_params = of_mapped_weights


def run(gguf: str, ids: list[int], prompt_tokens: int, new_tokens: int, threads: int) -> dict[str, Any]:
    """Seconds and bytes read of each token, the prompt first, and the tokens of the highest logits."""
    started_s = time.perf_counter()
    model = llama_cpp.Llama(
        gguf,
        n_ctx=prompt_tokens + new_tokens + 8,
        n_batch=max(512, prompt_tokens),
        n_threads=threads,
        n_threads_batch=threads,
        use_mmap=True,
        n_gpu_layers=0,
        verbose=False,
    )
    told: dict[str, Any] = {"load_s": time.perf_counter() - started_s, "seconds": [], "read_bytes": [], "greedy": []}
    steps = [ids[:prompt_tokens], *([one] for one in ids[prompt_tokens : prompt_tokens + new_tokens - 1])]
    for step in steps:
        before_bytes, started_s = read_bytes(), time.perf_counter()
        model.eval(step)
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        told["seconds"].append(time.perf_counter() - started_s)
        told["read_bytes"].append(read_bytes() - before_bytes)
        told["greedy"].append(max(range(model.n_vocab()), key=logits.__getitem__))
    return told


def main() -> None:
    gguf, plan, *numbers = sys.argv[1:]
    prompt_tokens, new_tokens, threads = map(int, numbers)
    map_weights()
    print(json.dumps(run(gguf, json.loads(Path(plan).read_text())["ids"], prompt_tokens, new_tokens, threads)))


if __name__ == "__main__":
    main()
