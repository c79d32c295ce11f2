"""llama.cpp as decode_worker.py is: `benchmarks/llama_worker.py GGUF CONTEXT THREADS`. It runs with
an interpreter that has llama-cpp-python and not this project.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from llama_decode import map_weights  # type: ignore[import-not-found]  # isort: skip  # first: it sets the environment
import llama_cpp  # type: ignore[import-not-found]

REHEARSED = list(range(5, 37))  # some ids, more than one tile


def main() -> None:
    gguf, context, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if not _runs(gguf, threads):
        map_weights()
        print("llama.cpp crashes on its repacked weights here, so it computes on those of the file", file=sys.stderr)
    model = _opened(gguf, context, threads)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": [_step(model, ids) for ids in json.loads(line)["steps"]]}), flush=True)


def _runs(gguf: str, threads: int) -> bool:
    """Whether a child process computes a prompt."""
    child = os.fork()
    if child == 0:
        _step(_opened(gguf, len(REHEARSED), threads), REHEARSED)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def _opened(gguf: str, context: int, threads: int) -> Any:
    return llama_cpp.Llama(
        gguf,
        n_ctx=context,
        n_batch=context,
        n_threads=threads,
        n_threads_batch=threads,
        use_mmap=True,
        n_gpu_layers=0,
        verbose=False,
    )


def _step(model: Any, ids: list[int]) -> float:
    if len(ids) > 1:
        model.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
    started_s = time.perf_counter()
    model.eval(ids)
    llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
