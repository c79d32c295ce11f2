"""The rows of bench_moe: weightd and its client, and llama.cpp, each with the same memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from bench_import import make_cold
from benchmarks.cgroup import capped_memory
from benchmarks.llama import LlamaTask, decode_llama
from benchmarks.processes import WEIGHTD, module_command, run_json, serving
from benchmarks.report import Row
from flags import size_given
from paper.peers import BESIDE_WEIGHTS_BYTES
from paper.rows import COLD, costs

from moe.client import Task
from moe.files import MixtureFiles
from weightd.serving.served_models import demand_of

MEMORY = {"all": 1.0, "half": 0.5, "quarter": 0.25}  # of the model's bytes
OURS = {True: "weightd", False: "no look-ahead"}
LLAMA, ACCELERATE = "llama.cpp", "accelerate"
ROWS = (*OURS.values(), LLAMA, ACCELERATE)
ACCELERATE_TOKENS = 4  # each reads most of what is offloaded
BESIDE_GIVEN_BYTES = 5 << 28  # of a memory in bytes, with which larger models and longer prompts are measured
POOL_BYTES_MIN = 32 << 20  # for a small model, which half is not enough to serve


def memory_given(text: str) -> str:
    """One of MEMORY, or the memory of all processes of a row, such as 10GB. Raises argparse.ArgumentTypeError."""
    if text not in MEMORY:
        size_given(text)
    return text


@dataclass(frozen=True)
class Work:
    """What every row decodes: a prompt, tokens that fill the pool, and tokens that are measured."""

    files: MixtureFiles
    prompt_tokens: int
    first_tokens: int
    tokens: int
    threads: int

    @property
    def new_tokens(self) -> int:
        return self.first_tokens + self.tokens

    @property
    def plan(self) -> Path:
        return self.files.plan_path

    def weights_bytes(self, memory: str) -> int:
        """The memory for weights."""
        if memory == "all":
            return self.files.model_bytes + (256 << 20)
        least_bytes = demand_of(self.files.record).minimum_bytes + POOL_BYTES_MIN
        if memory not in MEMORY:
            return max(size_given(memory) - BESIDE_GIVEN_BYTES, least_bytes)
        return max(round(self.files.model_bytes * MEMORY[memory]), least_bytes)

    def memory_bytes(self, memory: str) -> int:
        """The memory of all processes of a row, page cache included."""
        return self.weights_bytes(memory) + (BESIDE_WEIGHTS_BYTES if memory in MEMORY else BESIDE_GIVEN_BYTES)

    @property
    def routed_bytes(self) -> int:
        """Of the experts that a token chooses."""
        shape = self.files.shape
        return shape.layers * shape.chosen * shape.expert_bytes

    @property
    def touched_bytes(self) -> int:
        """Of the weights that a token needs: the chosen experts, and all others but the embeddings of other tokens."""
        shape, record = self.files.shape, self.files.record
        embeddings_bytes = 0 if record.tables else shape.matrix_bytes(shape.vocabulary, shape.hidden_size)
        return self.routed_bytes + record.resident_file_bytes - embeddings_bytes


def run_weightd(work: Work, memory: str, looks_ahead: bool) -> dict[str, Any]:
    """The output of moe/client.py, with `memory_bytes`. weightd and the client share one cgroup."""
    with capped_memory(work.memory_bytes(memory)) as cgroup:
        program = [*cgroup.prefix, *WEIGHTD]
        with serving(work.files.store, work.weights_bytes(memory), COLD, program) as daemon:
            numbers = work.prompt_tokens, work.new_tokens, looks_ahead, memory == "all"
            task = Task(daemon.address, work.files.name, daemon.pid, str(work.plan), *numbers)
            command = [*cgroup.prefix, *module_command("moe.client"), json.dumps(asdict(task))]
            told: dict[str, Any] = run_json(command, f"weightd, {memory}")
        return told | {"memory_bytes": work.memory_bytes(memory), "peak_bytes": cgroup.peak_bytes}


def weightd_row(work: Work, memory: str, looks_ahead: bool, told: dict[str, Any]) -> Row:
    """Means over the measured tokens. The prompt stands apart."""
    prompt, *tokens = told["tokens"]
    measured = tokens[work.first_tokens - 1 :]
    record, shape = work.files.record, work.files.shape
    cell_bytes = record.bundle.cell_bytes
    # What look-ahead has read in time would have been missing.
    cells_missed = mean(measured, "misses") + mean(measured, "prefetched_used")
    experts_missed = cells_missed * cell_bytes / shape.expert_bytes
    row: Row = {"row": OURS[looks_ahead], "memory": memory, "memory_gb": told["memory_bytes"] / 1e9}
    row |= {"peak_gb": told["peak_bytes"] / 1e9, "tokens": len(measured)}
    row |= {"tokens_per_s": 1 / mean(measured, "seconds"), "as_planned_share": told["as_planned"]} | costs(measured)
    missing_bytes = experts_missed * shape.expert_bytes
    row |= {"routed_gb_per_token": work.routed_bytes / 1e9, "missing_gb_per_token": missing_bytes / 1e9}
    row["hits_share"] = 1 - missing_bytes / work.routed_bytes
    if prefetched := mean(measured, "prefetched"):
        row["prefetched_gb_per_token"] = prefetched * cell_bytes / 1e9
        row["prefetched_used_share"] = mean(measured, "prefetched_used") / prefetched
    if experts_missed:
        row["read_over_missing_ratio"] = mean(measured, "read_bytes") / missing_bytes
        row["reads_per_expert"] = mean(measured, "reads") / experts_missed
    return row | {"prompt": prompt_row(work, prompt)}


def prompt_row(work: Work, prompt: dict[str, float]) -> Row:
    """The prompt of an empty pool: every expert that it chooses is read once."""
    shape, plan = work.files.shape, work.files.plan
    experts = sum(len(set(np.ravel(layer[: work.prompt_tokens]))) for layer in plan["choices"])
    return {
        "tokens": work.prompt_tokens,
        "seconds": prompt["seconds"],
        "experts_gb": experts * shape.expert_bytes / 1e9,
        "read_over_experts_ratio": prompt["read_bytes"] / (experts * shape.expert_bytes),
        "gb_per_s": prompt["read_bytes"] / prompt["seconds"] / 1e9,
    }


def rows_of(work: Work, memory: str, names: Sequence[str], python: Path | None, readaheads: Sequence[int]) -> list[Row]:
    """With look-ahead and without in the order A, B, B, A; the peers between them.

    Args:
        names: which of ROWS.
        python: an interpreter that has llama-cpp-python. None: names do not have LLAMA.
        readaheads: KiB; llama.cpp runs once with each.
    """
    looks = [looks_ahead for looks_ahead, name in OURS.items() if name in names]
    if memory == "all" and len(looks) > 1:  # nothing is read, so there is nothing to compare
        looks = looks[:1]
    ours = [(look, run_weightd(work, memory, look)) for look in looks]
    rows: list[Row] = []
    if python is not None:
        for readahead_kib in readaheads:
            told = run_llama(work, memory, python, readahead_kib)
            row = llama_row(work, memory, told, readahead_kib)
            if ours:
                same = [our == its for our, its in zip(ours[0][1]["greedy"], told["greedy"], strict=True)]
                row["same_greedy_share"] = fmean(same)
            rows.append(row)
    if ACCELERATE in names:
        rows.append(accelerate_row(work, memory, run_accelerate(work, memory)))
    ours += [(look, run_weightd(work, memory, look)) for look in reversed(looks)]
    return rows + [weightd_row(work, memory, look, told) for look, told in ours]


def run_llama(work: Work, memory: str, python: Path, readahead_kib: int) -> dict[str, Any]:
    """The output of benchmarks/llama_decode.py."""
    task = LlamaTask(python, work.files.gguf, work.plan, work.prompt_tokens, work.new_tokens, work.threads)
    return decode_llama(task, work.memory_bytes(memory), readahead_kib)


def llama_row(work: Work, memory: str, told: dict[str, Any], readahead_kib: int) -> Row:
    """Means over the measured tokens, the same as those of weightd."""
    seconds, read_bytes = (np.array(told[name][work.first_tokens :]) for name in ("seconds", "read_bytes"))
    return {
        "row": LLAMA,
        "memory": memory,
        "memory_gb": told["memory_bytes"] / 1e9,
        "readahead_kib": readahead_kib,
        "tokens": len(seconds),
        "tokens_per_s": float(1 / seconds.mean()),
        "total_ms": float(seconds.mean()) * 1e3,
        "read_gb_per_token": float(read_bytes.mean()) / 1e9,
        "prompt": {"tokens": work.prompt_tokens, "seconds": told["seconds"][0]},
    }


def run_accelerate(work: Work, memory: str) -> list[float]:
    """Seconds of each token, the prompt first."""
    memory_bytes = work.memory_bytes(memory)
    numbers = work.prompt_tokens, 1 + ACCELERATE_TOKENS, 0, memory_bytes
    make_cold(work.files.checkpoint)
    with capped_memory(memory_bytes) as cgroup:
        command = [*cgroup.prefix, *module_command("paper.peers"), ACCELERATE, str(work.files.checkpoint)]
        seconds: list[float] = run_json([*command, *map(str, numbers)], f"accelerate, {memory}")
    return seconds


def accelerate_row(work: Work, memory: str, seconds: Sequence[float]) -> Row:
    """The mean of the tokens after the prompt. Which experts are picked does not matter: all of a layer are loaded."""
    prompt_s, *tokens = seconds
    return {
        "row": ACCELERATE,
        "memory": memory,
        "memory_gb": work.memory_bytes(memory) / 1e9,
        "tokens": len(tokens),
        "tokens_per_s": 1 / fmean(tokens),
        "total_ms": fmean(tokens) * 1e3,
        "prompt": {"tokens": work.prompt_tokens, "seconds": prompt_s},
    }


def mean(tokens: Sequence[dict[str, float]], name: str) -> float:
    return sum(token[name] for token in tokens) / len(tokens)
