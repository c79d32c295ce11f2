"""llama.cpp as decode_worker.py is: `benchmarks/llama_worker.py GGUF CONTEXT THREADS`. It imports nothing of this
project, and runs with an interpreter that has llama-cpp-python.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import llama_cpp  # type: ignore[import-not-found]


def main() -> None:
    gguf, context, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = llama_cpp.Llama(
        gguf,
        n_ctx=context,
        n_batch=context,
        n_threads=threads,
        n_threads_batch=threads,
        use_mmap=True,
        n_gpu_layers=0,
        verbose=False,
    )
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": [_step(model, ids) for ids in json.loads(line)["steps"]]}), flush=True)


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
