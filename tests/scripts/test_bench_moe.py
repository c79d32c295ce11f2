"""scripts/bench_moe.py: a tiny planted mixture chooses as planned, and its rows are computed correctly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bench_moe
import numpy as np
import pytest
from benchmarks import readahead as readahead_module
from benchmarks.processes import BenchError
from benchmarks.readahead import readahead
from gguf import GGUFReader
from moe.files import MixtureFiles, mixture_files
from moe.rows import OURS, Work, run_weightd, weightd_row
from planted.mixture import DTYPE, GUESS_PRECISION
from safetensors.numpy import load_file
from simulation.policies import POLICIES

SHAPE = "olmoe-tiny"
LAYERS = 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> MixtureFiles:
    made = mixture_files(SHAPE, LAYERS, tmp_path_factory.mktemp("mixture"))
    made.planted()
    return made


def test_the_plan_says_what_routers_choose_and_guess(files: MixtureFiles) -> None:
    shape = files.shape
    assert len(files.plan["choices"]) == shape.layers
    for layer in files.plan["choices"]:
        uses = np.array(layer, np.uint32)
        assert uses.shape == (shape.tokens_max, shape.chosen)
        hits = POLICIES["LRU"](uses.reshape(-1), shape.experts // 2)
        assert hits[len(hits) // 4 :].mean() == pytest.approx(0.89, abs=0.04)
    assert files.plan["guess_precision"] == pytest.approx([GUESS_PRECISION] * (LAYERS - 1), abs=0.01)


def test_gguf_holds_the_same_numbers(files: MixtureFiles) -> None:
    files.converted()
    tensors = {tensor.name: tensor for tensor in GGUFReader(files.gguf).tensors}
    shards = [load_file(path) for path in sorted(files.checkpoint.glob("*.safetensors"))]
    published: dict[str, Any] = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert sum(tensor.n_elements for tensor in tensors.values()) == sum(tensor.size for tensor in published.values())
    for part in ("gate", "up", "down"):
        for expert in (0, files.shape.experts - 1):
            merged = tensors[f"blk.1.ffn_{part}_exps.weight"].data[expert]
            np.testing.assert_array_equal(merged, published[f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"])
    np.testing.assert_array_equal(
        tensors["blk.1.ffn_gate_inp.weight"].data, published["model.layers.1.mlp.gate.weight"]
    )


def test_a_row_of_weightd(files: MixtureFiles) -> None:
    files.imported()
    work = Work(files, prompt_tokens=12, first_tokens=4, tokens=4, threads=2)
    told = run_weightd(work, "half", looks_ahead=True)
    row = weightd_row(work, "half", True, told)
    assert row["as_planned_share"] == 1
    assert row["tokens"] == 4
    assert len(told["greedy"]) == 8
    assert row["prompt"]["read_over_experts_ratio"] == pytest.approx(1.0)
    assert row["peak_gb"] <= row["memory_gb"]
    assert work.routed_bytes == LAYERS * 4 * 3 * 512 * 128 * DTYPE.itemsize


def test_targets_are_means_of_both_runs() -> None:
    ours: list[dict[str, Any]] = [
        {"row": OURS[True], "memory": "half", "over_bound_ratio": 1.2, "tokens_per_s": 4.0},
        {"row": OURS[True], "memory": "half", "over_bound_ratio": 1.6, "tokens_per_s": 6.0},
        {"row": OURS[False], "memory": "half", "over_bound_ratio": 9.0, "tokens_per_s": 1.0},
        {"row": "llama.cpp", "memory": "half", "tokens_per_s": 2.0},
    ]
    bound, faster = bench_moe.targets_of(ours)
    assert (bound.name, bound.met) == ("token_over_bound_ratio_half", False)
    assert (faster.name, faster.met) == ("over_llama_cpp_ratio_half", True)
    assert (bound.value, faster.value) == pytest.approx((1.4, 2.5))


def test_readahead_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "read_ahead_kb"
    file.write_text("8192\n")
    monkeypatch.setattr(readahead_module, "readahead_file", lambda _: file)
    with readahead(tmp_path, 128):
        assert file.read_text() == "128"
    assert file.read_text() == "8192\n"
    with pytest.raises(SystemExit), readahead(tmp_path, 128):
        readahead_module._exit(15, None)
    assert file.read_text() == "8192\n"
    file.unlink()
    with pytest.raises(BenchError, match="run it as root"), readahead(tmp_path, 128):
        pass
