"""Rows and targets of bench_memory_speed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from benchmarks.report import Row, Target

from memory_speed.models import MeasuredModel
from memory_speed.turns import LLAMA, OURS, Worker

OVER_LLAMA_TARGET, SMALL_OVER_LLAMA_TARGET, PROMPT_TARGET = 0.95, 0.8, 0.8
# PowerInfer's speed, measured once with everything in memory: 17.4 tokens/s where llama.cpp decoded 14.5.
PREDICT_OVER_LLAMA_TARGET = 1.2
MESSAGES_TARGET, OUTSIDE_TARGET = 2.0, 0.1


def row_of(worker: Worker, model: MeasuredModel, memory_gb_per_s: float) -> Row:
    """Medians over the turns."""
    token_s = median(worker.seconds)
    token_bytes = model.token_bytes[worker.mode or "exact"]
    gb_per_s = token_bytes / token_s / 1e9
    row: Row = {
        "model": model.title,
        "row": worker.name if worker.mode is None else f"{worker.name}, {worker.mode}",
        "tokens_per_s": 1 / token_s,
        "token_ms": token_s * 1e3,
        "gb_per_token": token_bytes / 1e9,
        "gb_per_s": gb_per_s,
        "memory_gb_per_s": memory_gb_per_s,
        "over_memory_ratio": gb_per_s / memory_gb_per_s,
        "prompt_s": median(worker.prompt_s),
    }
    if worker.mode is not None:
        row["outside_kernels_share"] = 1 - median(worker.kernel_share)
        row["messages_per_layer"] = median(worker.messages) / model.layers
    return row


def targets_of(model: MeasuredModel, rows: Sequence[Row]) -> list[Target]:
    """Speed beside llama.cpp, messages, and the time outside of kernels. `rows`: of one model."""
    by_name = {row["row"]: row for row in rows}
    exact = by_name[f"{OURS}, exact"]
    name = model.name
    targets = [Target(f"messages_per_layer_{name}", exact["messages_per_layer"], "", MESSAGES_TARGET, "lower")]
    if model.is_large:
        share = exact["outside_kernels_share"]
        targets.append(Target(f"outside_kernels_share_{name}", share, "", OUTSIDE_TARGET, "lower"))
    if (peer := by_name.get(LLAMA)) is None:
        return targets
    least = OVER_LLAMA_TARGET if model.is_large else SMALL_OVER_LLAMA_TARGET
    faster, prompt = (peer[value] / exact[value] for value in ("token_ms", "prompt_s"))
    targets.append(Target(f"exact_over_llama_cpp_ratio_{name}", faster, "x", least, "higher"))
    targets.append(Target(f"prompt_over_llama_cpp_ratio_{name}", prompt, "x", PROMPT_TARGET, "higher"))
    if (sparse := by_name.get(f"{OURS}, predict")) is not None:
        faster = peer["token_ms"] / sparse["token_ms"]
        targets.append(Target(f"predict_over_llama_cpp_ratio_{name}", faster, "x", PREDICT_OVER_LLAMA_TARGET, "higher"))
    return targets
