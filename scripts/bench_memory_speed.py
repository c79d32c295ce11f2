#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Measures decoding with everything in memory, beside llama.cpp and transformers, and where a token's time goes.

A dense model (SwiGLU, random weights) is loaded by all three at once, and they take turns: each decodes some tokens,
in the order A, B, C, C, B, A. Reading memory with the same threads takes turns with them, too. llama.cpp
(llama-cpp-python, built for this processor) maps the same weights as F16. A token needs every weight but the input
embedding once. The files take 8.1 GB for Llama 1.3B's shape, the processes as much memory; without peers it is 5.4 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from flags import FlagParser

import flashclient  # isort: skip  # noqa: F401 - before torch, so that torch's idle threads do not spin
import numpy as np
import torch
from benchmarks.decode_worker import Model
from benchmarks.forced_tokens import random_ids
from benchmarks.llama import add_environment_flag, llama_python
from benchmarks.memory_read import read_memory
from benchmarks.processes import SCRIPTS, BenchError, module_command, serving
from benchmarks.report import Row, Target, machine_facts, report
from planted.dense import EMBEDDING, bytes_of, dense_config, write_dense_gguf
from planted.plan import SHAPES
from planted.shapes import checkpoint_shapes
from planted.store import PlantedStore, cut, dense_store

DENSE_SHAPES = tuple(name for name, shape in SHAPES.items() if shape.family == "llama")
OURS, LLAMA, PLAIN = "weightd, exact", "llama.cpp", "transformers"
SPARE_BYTES = 1 << 30  # of --dram, above the model
CONTEXT_TOKENS = 2048
READ_BYTES = 1 << 29  # of memory, larger than the caches
SEED = 11
OVER_LLAMA_TARGET, PROMPT_TARGET, MESSAGES_TARGET, OUTSIDE_TARGET = 0.95, 0.8, 2.0, 0.1


@dataclass
class Worker:
    """A process that decodes on request. Its lists have an entry a turn, or a prompt."""

    name: str
    process: subprocess.Popen[str]
    seconds: list[float] = field(default_factory=list)
    kernel_s: list[float] = field(default_factory=list)
    messages: list[float] = field(default_factory=list)
    prompt_s: list[float] = field(default_factory=list)

    def ask(self, steps: list[list[int]]) -> dict[str, Any]:
        """The answer to these steps. Raises BenchError if the process has ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(steps) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BenchError(f"{self.name} ended with status {self.process.wait()}")
        told: dict[str, Any] = json.loads(line)
        return told

    def decode(self, ids: Sequence[int]) -> None:
        """One turn."""
        told = self.ask([[one] for one in ids])
        self.seconds.append(median(told["seconds"]))
        if "kernel_s" in told:
            self.kernel_s.append(told["kernel_s"] / sum(told["seconds"]))
            self.messages.append(told["messages"] / len(ids))


def main() -> int:
    options = _options()
    try:
        machine, rows, targets = measure(options)
    except (BenchError, OSError) as error:
        print(f"bench_memory_speed: {error}", file=sys.stderr)
        return 1
    report(machine, rows, targets, options.json)
    return 0


def measure(options: argparse.Namespace) -> tuple[Row, list[Row], list[Target]]:
    """Machine, rows and targets."""
    dense = dense_store(options.shape, options.folder, options.layers)
    shape, _ = cut(options.shape, options.layers)
    sizes = checkpoint_shapes(dense_config(shape))
    token_bytes = bytes_of(size for name, size in sizes.items() if name != EMBEDDING)
    machine = machine_facts(options.folder) | {"shape": options.shape, "threads": options.threads}
    with ExitStack() as opened:
        workers = [opened.enter_context(one) for one in _workers(options, dense, opened)]
        memory = Memory(options.threads)
        for worker in workers:
            _prompts(worker, options, shape.vocabulary)
        for turn in range(2 * options.rounds):
            for worker in workers if turn % 2 == 0 else reversed(workers):
                worker.decode(random_ids(shape.vocabulary, options.tokens, SEED + turn))
            memory.read()
    rows = [row_of(worker, token_bytes, memory.gb_per_s, shape.layers) for worker in workers]
    return machine, rows, targets_of(rows)


class Memory:
    """The speed at which the same threads read memory."""

    def __init__(self, threads: int) -> None:
        self._array = np.ones(READ_BYTES, np.uint8)
        self._threads = threads
        self._speeds: list[float] = []

    def read(self) -> None:
        started_s = time.perf_counter()
        read_memory(self._array, self._threads)
        self._speeds.append(READ_BYTES / (time.perf_counter() - started_s) / 1e9)

    @property
    def gb_per_s(self) -> float:
        return median(self._speeds)


def _workers(options: argparse.Namespace, dense: PlantedStore, opened: ExitStack) -> Iterator[Any]:
    daemon = opened.enter_context(serving(dense.store, dense.model_bytes + SPARE_BYTES))
    threads = options.threads
    ours = Model("weightd", daemon.address, dense.name, threads, {"mode": "exact"})
    yield _started(OURS, [*module_command("benchmarks.decode_worker"), json.dumps(asdict(ours))])
    if options.no_peers:
        return
    gguf = dense.checkpoint.with_name(f"gguf-{dense.name}") / f"{dense.name}.gguf"
    python = llama_python(options.llama_cpp)
    if not gguf.exists():
        write_dense_gguf(cut(options.shape, options.layers)[0], dense.checkpoint, gguf)
    llama = [str(python), str(SCRIPTS / "benchmarks" / "llama_worker.py"), str(gguf), str(CONTEXT_TOKENS), str(threads)]
    yield _started(LLAMA, llama)
    plain = Model("transformers", str(dense.checkpoint), dense.name, threads, {})
    yield _started(PLAIN, [*module_command("benchmarks.decode_worker"), json.dumps(asdict(plain))])


@contextmanager
def _started(name: str, command: Sequence[str]) -> Iterator[Worker]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        worker = Worker(name, process)
        worker.answer()  # it is ready
        yield worker
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def _prompts(worker: Worker, options: argparse.Namespace, vocabulary: int) -> None:
    """Prompts, each anew. The first warms the caches and is not counted; after the last the tokens follow."""
    for number in range(options.prompts + 1):
        told = worker.ask([random_ids(vocabulary, options.prompt_tokens, SEED - number)])
        if number:
            worker.prompt_s.append(told["seconds"][0])


def row_of(worker: Worker, token_bytes: int, memory_gb_per_s: float, layers: int) -> Row:
    """Medians over the turns."""
    token_s = median(worker.seconds)
    gb_per_s = token_bytes / token_s / 1e9
    row: Row = {
        "row": worker.name,
        "tokens_per_s": 1 / token_s,
        "token_ms": token_s * 1e3,
        "gb_per_token": token_bytes / 1e9,
        "gb_per_s": gb_per_s,
        "memory_gb_per_s": memory_gb_per_s,
        "over_memory_ratio": gb_per_s / memory_gb_per_s,
        "prompt_s": median(worker.prompt_s),
    }
    if worker.kernel_s:
        row["outside_kernels_share"] = 1 - median(worker.kernel_s)
        row["messages_per_layer"] = median(worker.messages) / layers
    return row


def targets_of(rows: Sequence[Row]) -> list[Target]:
    """Speed beside llama.cpp, messages, and the time outside of kernels."""
    by_name = {row["row"]: row for row in rows}
    ours = by_name[OURS]
    targets = [
        Target("messages_per_layer", ours["messages_per_layer"], "", MESSAGES_TARGET, "lower"),
        Target("outside_kernels_share", ours["outside_kernels_share"], "", OUTSIDE_TARGET, "lower"),
    ]
    if LLAMA in by_name:
        faster = by_name[LLAMA]["token_ms"] / ours["token_ms"]
        prompt = by_name[LLAMA]["prompt_s"] / ours["prompt_s"]
        targets.append(Target("exact_over_llama_cpp_ratio", faster, "x", OVER_LLAMA_TARGET, "higher"))
        targets.append(Target("prompt_over_llama_cpp_ratio", prompt, "x", PROMPT_TARGET, "higher"))
    return targets


def _options() -> argparse.Namespace:
    parser = FlagParser(__doc__)
    parser.add_argument("--shape", choices=DENSE_SHAPES, default="llama-1.3b")
    parser.add_argument("--layers", type=int, help="of the model, fewer than the shape has")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="for the files, which are kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=8, help="tokens of a turn")
    parser.add_argument("--rounds", type=int, default=4, help="of two turns each")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--no-peers", action="store_true", help="do not run llama.cpp and transformers")
    add_environment_flag(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
