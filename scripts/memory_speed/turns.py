"""Processes that decode on request and take turns, and the speed of memory between the turns."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from benchmarks.decode_worker import Model
from benchmarks.forced_tokens import random_ids
from benchmarks.memory_read import read_memory
from benchmarks.processes import SCRIPTS, BenchError, module_command, serving

from memory_speed.models import MeasuredModel

OURS, LLAMA, PLAIN = "weightd", "llama.cpp", "transformers"
SPARE_BYTES = 1 << 30  # of --dram, above the model
CONTEXT_TOKENS = 2048
READ_BYTES = 1 << 29  # of memory, larger than the caches
SEED = 11
GOMP_SPINCOUNT = "300000"  # the default of libgomp


@dataclass
class Worker:
    """A process that decodes on request. Its lists have an entry a turn, or a prompt."""

    name: str
    process: subprocess.Popen[str]
    mode: str | None = None  # of a client of weightd
    seconds: list[float] = field(default_factory=list)
    kernel_share: list[float] = field(default_factory=list)
    messages: list[float] = field(default_factory=list)  # of a token
    prompt_s: list[float] = field(default_factory=list)

    def ask(self, steps: list[list[int]], times_kernels: bool = False) -> dict[str, Any]:
        """The answer to these steps. Raises BenchError if the process has ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"steps": steps, "times_kernels": times_kernels}) + "\n")
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
        """One turn. The time of kernels is taken in a few tokens more, because taking it costs time."""
        told = self.ask([[one] for one in ids])
        self.seconds.append(median(told["seconds"]))
        if self.mode is not None:
            self.messages.append(told["messages"] / len(ids))
            timed = self.ask([[one] for one in ids[: len(ids) // 2]], times_kernels=True)
            self.kernel_share.append(timed["kernel_s"] / sum(timed["seconds"]))

    def begin(self, vocabulary: int, tokens: int, prompts: int) -> None:
        """Prompts, each anew; after the last the turns follow. One before them reads what is not yet in memory."""
        uncounted = 0 if self.name == PLAIN else 1
        for number in range(uncounted + prompts):
            told = self.ask([random_ids(vocabulary, tokens, SEED - number)])
            if number >= uncounted:
                self.prompt_s.append(told["seconds"][0])


class Memory:
    """The greatest speed at which the same threads read memory.

    What was not touched for seconds is read more slowly the first time: on a virtual machine its pages may have moved.
    """

    def __init__(self, threads: int) -> None:
        self._array = np.ones(READ_BYTES, np.uint8)
        self._threads = threads
        self._speeds: list[float] = []

    def read(self) -> None:
        read_memory(self._array, self._threads)
        started_s = time.perf_counter()
        read_memory(self._array, self._threads)
        self._speeds.append(READ_BYTES / (time.perf_counter() - started_s) / 1e9)

    @property
    def gb_per_s(self) -> float:
        return max(self._speeds)


@dataclass(frozen=True)
class Turns:
    """How much is decoded: `rounds` of two turns of `tokens` tokens each, after `prompts` prompts."""

    rounds: int
    tokens: int
    prompts: int
    prompt_tokens: int

    def run(self, model: MeasuredModel, threads: int, python: Path | None) -> tuple[list[Worker], float]:
        """The workers, with what they took, and GB/s of memory. Workers take turns in the order A, B, C, C, B, A.

        Args:
            python: an interpreter that has llama-cpp-python; None: no peers.
        """
        with ExitStack() as opened:
            memory = Memory(threads)
            workers = [opened.enter_context(one) for one in _workers(model, threads, python, opened)]
            for worker in workers:
                worker.begin(model.vocabulary, self.prompt_tokens, self.prompts)
            for turn in range(2 * self.rounds):
                for worker in workers if turn % 2 == 0 else reversed(workers):
                    worker.decode(random_ids(model.vocabulary, self.tokens, SEED + turn))
                memory.read()
        return workers, memory.gb_per_s


def _workers(
    model: MeasuredModel, threads: int, python: Path | None, opened: ExitStack
) -> Iterator[AbstractContextManager[Worker]]:
    stored = model.stored
    program = module_command("benchmarks.decode_worker")
    # Room for each client to lease all cells, most of which are the same and in memory once.
    dram_bytes = len(model.token_bytes) * stored.model_bytes + SPARE_BYTES
    daemon = opened.enter_context(serving(stored.store, dram_bytes))
    for mode in model.token_bytes:
        ours = Model("weightd", daemon.address, stored.name, threads, {"mode": mode})
        yield _started(OURS, [*program, json.dumps(asdict(ours))], mode)
    if python is None:
        return
    llama = [str(SCRIPTS / "benchmarks" / "llama_worker.py"), str(model.gguf()), str(CONTEXT_TOKENS), str(threads)]
    yield _started(LLAMA, [str(python), *llama])
    if not model.in_transformers:
        return
    path, options = model.loaded()
    plain = Model("transformers", path, stored.name, threads, options)
    spins = {"GOMP_SPINCOUNT": GOMP_SPINCOUNT}  # flashclient's setting costs transformers speed where it is alone
    yield _started(PLAIN, [*program, json.dumps(asdict(plain))], more=spins)


@contextmanager
def _started(
    name: str, command: Sequence[str], mode: str | None = None, more: Mapping[str, str] | None = None
) -> Iterator[Worker]:
    """A worker, with `more` in its environment."""
    pipe, environment = subprocess.PIPE, os.environ | (more or {})
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        worker = Worker(name, process, mode)
        try:
            worker.answer()  # it is ready
            yield worker
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
