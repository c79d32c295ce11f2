"""The rows of the paper's Table 2. Each has its own weightd and client, on the same store and device.

Every row adds one step. The row "hybrid" keeps half of the model in memory and reads the rest for each token. Without
bundling the daemon reads the parts of a neuron's bundle (up row and down column) with one request each,
from the same file (paper/unbundled.py): the requests that it would need if the parts lay apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from benchmarks.processes import WEIGHTD, BenchError, module_command, run_json, serving
from benchmarks.report import Row

from paper.client import Task
from weightd.serving.served_models import demand_of
from weightd.store.store import Store

FIRST_TOKENS = 50  # in which the window fills (section 4 of the paper)
SWEEP_POOL_BYTES = 16 << 20  # the look-ahead of a client that streams every layer, twice: it gets half of the pool
SHARES = {"half": 1 / 2, "quarter": 1 / 4}
LAYER_POOL_SHARE = 0.25  # of a layer: its predicted neurons, twice and a little more


@dataclass(frozen=True)
class RowPlan:
    """One row: the techniques that it uses.

    Attributes:
        memory: "half" or a "quarter" of the model (Work.whole_bytes), or the least memory for streaming ("sweep") or
            for one layer's predicted neurons at a time ("layer").
        resident: whether the weights outside the FFNs stay in memory; otherwise they are read again for each token.
        dense: every neuron is read for each token, so a few tokens are measured.
        bundled: whether a neuron is read with one request; otherwise with one for each part of its bundle.
    """

    name: str
    memory: Literal["half", "quarter", "sweep", "layer"] = "half"
    resident: bool = True
    dense: bool = False
    bundled: bool = True
    flags: tuple[str, ...] = ()  # of weightd
    options: dict[str, Any] = field(default_factory=dict)  # of FlashClient


COLD = ("--cold-start",)  # without the hotness that another row has measured
ROWS = (
    RowPlan("naive", memory="sweep", resident=False, dense=True, flags=COLD, options={"mode": "exact"}),
    RowPlan("hybrid", dense=True, flags=COLD, options={"mode": "exact"}),
    RowPlan("+predictor", memory="layer", bundled=False, flags=COLD, options={"mode": "predict", "window": 0}),
    RowPlan("+windowing", bundled=False, flags=COLD, options={"mode": "predict", "window": 4}),
    RowPlan("+bundling", flags=COLD, options={"mode": "predict", "window": 4}),
    # No window, because it takes memory from the pool, which keeps what is used often: with half of OPT-1.3B in memory,
    # windows of 0, 1 and 2 tokens read 59, 70 and 92 MB per token.
    RowPlan("all", options={"mode": "predict", "window": 0}),
)


@dataclass(frozen=True)
class Work:
    """The work of every row: a prompt of random ids, then forced random ids.

    Attributes:
        whole_bytes: of the model that memory is a share of, if not of this store's.
    """

    checkpoint: Path
    store: Path
    model: str
    prompt_tokens: int
    new_tokens: int
    dense_tokens: int
    seed: int
    whole_bytes: int | None = field(default=None, kw_only=True)

    @property
    def model_bytes(self) -> int:
        """All weights: FFNs, resident part and tables."""
        record = Store.open(self.store, readonly=True).model(self.model)
        return sum(one.bundles_file_bytes + one.resident_file_bytes for one in (record, *record.tables))

    def dram_bytes(self, memory: str) -> int:
        """A share of the model, or the minimum for a small model, which the share is not enough to serve."""
        record = Store.open(self.store, readonly=True).model(self.model)
        layer_bytes = record.bundles_file_bytes // len(record.layers)
        layer_pool_bytes = 0 if memory == "sweep" else int(layer_bytes * LAYER_POOL_SHARE)
        least_bytes = demand_of(record).minimum_bytes + SWEEP_POOL_BYTES + layer_pool_bytes
        share = SHARES.get(memory)
        whole_bytes = self.model_bytes if self.whole_bytes is None else self.whole_bytes
        return least_bytes if share is None else max(int(whole_bytes * share), least_bytes)


def unbundled_weightd(work: Work) -> list[str]:
    """The command that runs instead of weightd. Raises BenchError if parts of bundles are not whole blocks."""
    bundle = Store.open(work.store, readonly=True).model(work.model).bundle
    part_bytes = bundle.bundle_bytes // len(bundle.parts)
    if bundle.bundle_bytes != bundle.cell_bytes or part_bytes % bundle.block_bytes:
        raise BenchError(
            f"rows without bundling need parts of whole blocks: a part of {work.model!r} has {part_bytes} bytes, "
            f"a block {bundle.block_bytes}; choose a shape with wider layers"
        )
    return [*module_command("paper.unbundled"), str(part_bytes)]


def run_row(plan: RowPlan, work: Work, prefix: Sequence[str] = ()) -> dict[str, Any]:
    """The output of the row's client (paper/client.py), with `dram_bytes`.

    Args:
        prefix: comes before the commands of weightd and the client.
    """
    dram_bytes = work.dram_bytes(plan.memory)
    again = None if plan.resident else Store.open(work.store, readonly=True).resident_path(work.model)
    program = [*prefix, *(WEIGHTD if plan.bundled else unbundled_weightd(work))]
    with serving(work.store, dram_bytes, plan.flags, program) as daemon:
        task = Task(
            daemon.address,
            work.model,
            daemon.pid,
            work.prompt_tokens,
            work.dense_tokens if plan.dense else work.new_tokens,
            work.seed,
            plan.options,
            None if again is None else str(again),
            None if plan.dense else str(work.checkpoint),
        )
        command = [*prefix, *module_command("paper.client"), json.dumps(asdict(task))]
        told: dict[str, Any] = run_json(command, plan.name)
    held_bytes = 0 if again is None else again.stat().st_size  # weights that are read again count as not held
    return told | {"dram_bytes": dram_bytes - held_bytes}


def summary(name: str, told: dict[str, Any]) -> Row:
    """One row of Tables 2 and 3: per token, without the prompt and the first tokens, which are given separately."""
    tokens = told["tokens"][1:]  # the first is the prompt
    steady = tokens[FIRST_TOKENS:] or tokens
    row: Row = {"row": name, "tokens": len(tokens), "dram_gb": told["dram_bytes"] / 1e9}
    memory = told["memory"]
    row["all_memory_gb"] = (memory["client_bytes"] + memory["daemon_bytes"]) / 1e9
    if told.get("firing"):
        row |= told["firing"]
    row |= costs(steady)
    return row | {"prompt_s": told["tokens"][0]["seconds"], "first_tokens": costs(tokens[:FIRST_TOKENS])}


def costs(tokens: Sequence[dict[str, float]]) -> Row:
    """Means, and percentiles of the read time and the total time of a token."""

    def each(*names: str) -> Any:
        return np.array([sum(token.get(name, 0.0) for name in names) for token in tokens])

    read_bytes, io_s, seconds = each("read_bytes", "again_bytes"), each("reading_s", "again_s"), each("seconds")
    row: Row = {
        "read_gb_per_token": read_bytes.mean() / 1e9,
        "reads_per_token": each("reads").mean(),
        "gb_per_s": read_bytes.sum() / io_s.sum() / 1e9 if io_s.sum() else 0.0,
        "io_ms": io_s.mean() * 1e3,
        "total_ms": seconds.mean() * 1e3,
    }
    row |= parts(each) if "forward_s" in tokens[0] else {}
    for name, values in (("io", io_s), ("total", seconds)):
        row |= {f"{name}_ms_p{share}": float(np.percentile(values, share)) * 1e3 for share in (50, 90, 99)}
    return {key: float(value) for key, value in row.items()}


def parts(each: Callable[..., Any]) -> Row:
    """The parts of a token's time in ms: waiting for flash, computation, and the rest, which is memory management.

    Args:
        each: returns the sum of the times that it is given by name, [tokens]. In the client's clock `forward_s`, the
            time of the whole model, includes `ffn_s` and `head_s`; `ffn_s` includes `predict_s`, `acquire_s`,
            `compute_s` and `wait_s`.
    """
    seconds, wait_s = each("seconds"), each("wait_s", "again_s")
    computing = {
        "attention_ms": each("forward_s") - each("ffn_s", "head_s"),
        "head_ms": each("head_s"),
        "predict_ms": each("predict_s"),
        "ffn_ms": each("compute_s"),
    }
    compute_s = sum(computing.values())
    management_s = seconds - wait_s - compute_s
    row: Row = {name: values.mean() * 1e3 for name, values in computing.items()}
    row |= {"wait_ms": wait_s.mean() * 1e3, "compute_ms": compute_s.mean() * 1e3}
    return row | {
        "management_ms": management_s.mean() * 1e3,
        "acquire_ms": each("acquire_s").mean() * 1e3,
        "overhead_share": management_s.sum() / seconds.sum(),
    }
