"""scripts/bench_moe.py: a tiny planted mixture chooses as planned, and its rows are computed correctly."""

from __future__ import annotations

import importlib
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_moe
import numpy as np
import pytest
from benchmarks import readahead as readahead_module
from benchmarks.llama import DEFAULT
from benchmarks.processes import BenchError
from benchmarks.readahead import readahead
from benchmarks.storage_reads import read_bytes
from gguf import GGUFReader, dequantize
from moe import rows as rows_module
from moe.files import MixtureFiles, mixture_files
from moe.rows import ACCELERATE, LLAMA, OURS, ROWS, Work, llama_row, memory_given, run_llama, run_weightd, weightd_row
from planted.blocks import KINDS, BlockNoise
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


# Scales of MXFP4 double.
@pytest.mark.parametrize(("encoding", "within"), [("Q4_K", 0.02), ("Q4_0", 0.02), ("Q8_0", 0.02), ("MXFP4", 0.42)])
def test_blocks_hold_the_values_that_routers_are_made_for(encoding: str, within: float) -> None:
    noise = BlockNoise(KINDS[encoding], 3)
    for deviation in (1.0, 0.03, 0.0003):
        matrix = noise.matrix(64, 512, deviation)
        np.testing.assert_array_equal(dequantize(matrix.blocks, KINDS[encoding].encoding), matrix.float().numpy())
        assert matrix.float().std() == pytest.approx(deviation, rel=within)
        assert abs(matrix.float().mean()) < deviation / 20


@pytest.mark.parametrize(("shape", "encoding"), [("qwen3-tiny-q4_k", "Q4_K"), ("gpt-oss-tiny-mxfp4", "MXFP4")])
def test_a_quantised_mixture_chooses_as_planned(tmp_path: Path, shape: str, encoding: str) -> None:
    files = mixture_files(shape, LAYERS, tmp_path)
    files.planted()
    files.imported()
    files.converted()
    assert files.gguf == files.checkpoint
    work = Work(files, prompt_tokens=12, first_tokens=4, tokens=4, threads=2)
    told = run_weightd(work, "2GB", looks_ahead=True)
    row = weightd_row(work, "2GB", True, told)
    assert (row["as_planned_share"], row["memory_gb"]) == (1, 2.0)
    assert row["prompt"]["read_over_experts_ratio"] == pytest.approx(1.0, abs=0.03)  # cells are padded
    assert {part.encoding.format for part in files.record.bundle.parts} == {encoding}


def test_memory_is_a_share_or_a_size() -> None:
    assert [memory_given(text) for text in ("half", "10GB")] == ["half", "10GB"]
    with pytest.raises(ArgumentTypeError, match="most"):
        memory_given("most")


def test_a_row_of_weightd(files: MixtureFiles) -> None:
    files.imported()
    work = Work(files, prompt_tokens=12, first_tokens=4, tokens=4, threads=2)
    told = run_weightd(work, "half", looks_ahead=True)
    row = weightd_row(work, "half", True, told)
    assert row["as_planned_share"] == 1
    assert row["tokens"] == 4
    assert row["predict_ms"] > 0  # routers are part of native layers, as they are without a benchmark
    assert len(told["greedy"]) == 8
    assert row["prompt"]["read_over_experts_ratio"] == pytest.approx(1.0)
    assert row["peak_gb"] <= row["memory_gb"]
    assert work.routed_bytes == LAYERS * 4 * 3 * 512 * 128 * DTYPE.itemsize


def test_llama_cpp_computes_the_same_model(files: MixtureFiles) -> None:
    python = DEFAULT / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-c", "import llama_cpp"], check=False).returncode:
        pytest.skip(f"no llama-cpp-python in {DEFAULT}; scripts/bench_moe.py makes it")
    files.imported()
    files.converted()
    work = Work(files, prompt_tokens=12, first_tokens=4, tokens=16, threads=2)
    told = run_llama(work, "half", python, 128)
    ours = run_weightd(work, "half", looks_ahead=False)
    assert told["greedy"] == ours["greedy"]
    assert sum(token["prefetched"] for token in ours["tokens"]) == 0
    row = llama_row(work, "half", told, 128)
    assert row["tokens"] == 16
    assert row["prompt"]["seconds"] > 0


class FakeLlama:
    """A model whose favourite token is the one after the last that it was given."""

    evaluated: list[list[int]]

    def __init__(self, *_: Any, **options: Any) -> None:
        self.options = options
        self.ctx = self
        FakeLlama.evaluated = []

    def eval(self, tokens: list[int]) -> None:
        FakeLlama.evaluated.append(tokens)

    def n_vocab(self) -> int:
        return 100

    def logits(self) -> list[float]:
        return [float(token == FakeLlama.evaluated[-1][-1] + 1) for token in range(self.n_vocab())]


def test_the_peer_is_given_the_prompt_and_then_single_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("llama_cpp")
    monkeypatch.setattr(package, "Llama", FakeLlama, raising=False)
    monkeypatch.setattr(package, "llama_get_logits_ith", lambda model, _: model.logits(), raising=False)
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    monkeypatch.setitem(
        sys.modules, "storage_reads", sys.modules["benchmarks.storage_reads"]
    )  # the peer runs in the folder of its file
    peer = importlib.import_module("benchmarks.llama_decode")
    monkeypatch.setattr(peer, "read_bytes", iter(range(0, 600, 100)).__next__)
    told = peer.run("model.gguf", [10, 20, 30, 40, 50, 60], prompt_tokens=3, new_tokens=3, threads=2)
    assert FakeLlama.evaluated == [[10, 20, 30], [40], [50]]
    assert told["greedy"] == [31, 41, 51]
    assert told["read_bytes"] == [100, 100, 100]
    assert len(told["seconds"]) == 3


def test_bytes_read_by_a_process_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    io = "rchar: 7\nwchar: 8\nread_bytes: 4096\nwrite_bytes: 12\ncancelled_write_bytes: 0\n"
    monkeypatch.setattr(Path, "read_text", lambda _: io)
    assert read_bytes() == 4096


def test_a_row_of_llama_cpp_leaves_out_the_first_tokens(files: MixtureFiles) -> None:
    files.imported()
    work = Work(files, prompt_tokens=4, first_tokens=2, tokens=2, threads=2)
    seconds, read_bytes = [9.0, 5.0, 0.5, 0.3], [9 << 30, 5 << 30, 100, 300]
    told = {"seconds": seconds, "read_bytes": read_bytes, "memory_bytes": 2 << 30}
    row = llama_row(work, "half", told, 512)
    assert (row["row"], row["readahead_kib"], row["tokens"]) == (LLAMA, 512, 2)
    assert (row["tokens_per_s"], row["read_gb_per_token"]) == pytest.approx((2.5, 200e-9))
    assert row["prompt"]["seconds"] == 9.0


def test_rows_of_weightd_lie_around_those_of_the_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []

    def ours(_: Any, memory: str, look: bool) -> dict[str, Any]:
        ran.append(OURS[look])
        return {"greedy": [1, 2, 3, 4]}

    def peer(_: Any, memory: str, python: Path, readahead_kib: int) -> dict[str, Any]:
        ran.append(readahead_kib)
        return {"greedy": [1, 2, 3, 5]}

    def accelerate(*_: Any) -> list[float]:
        ran.append(ACCELERATE)
        return [9.0, 1.0]

    monkeypatch.setattr(rows_module, "run_weightd", ours)
    monkeypatch.setattr(rows_module, "run_llama", peer)
    monkeypatch.setattr(rows_module, "run_accelerate", accelerate)
    for name in ("weightd_row", "llama_row", "accelerate_row"):
        monkeypatch.setattr(rows_module, name, lambda *_: {})
    work: Any = None
    rows = rows_module.rows_of(work, "half", ROWS, Path("python"), [128, 512])
    look, plain = OURS[True], OURS[False]
    assert ran == [look, plain, 128, 512, ACCELERATE, plain, look]
    assert [row.get("same_greedy_share") for row in rows] == [0.75, 0.75, None, None, None, None, None]
    ran.clear()
    rows_module.rows_of(work, "all", [look, plain], None, [128])
    assert ran == [look, look]


def test_all_rows_have_the_same_speed_of_the_device() -> None:
    work: Any = None
    speeds = bench_moe.Speeds(work, device=[1.0, 3.0], memory=[20.0])
    ours: list[dict[str, Any]] = [
        {"gb_per_s": 2.5, "missing_gb_per_token": 0.5, "total_ms": 300.0},
        {"gb_per_s": 1.5, "missing_gb_per_token": 0.1, "total_ms": 300.0},
    ]
    facts = speeds.facts(ours)
    assert (facts["device_gb_per_s"], facts["fio_gb_per_s"]) == (2.5, 2.0)
    for row in ours:
        bench_moe.set_bound(row, facts, touched_bytes=2_000_000_000)
    assert [row["bound_ms"] for row in ours] == pytest.approx([200, 100])  # the device; memory
    assert [row["over_bound_ratio"] for row in ours] == pytest.approx([1.5, 3.0])


def test_targets_are_means_of_both_runs_and_the_fastest_of_the_peer() -> None:
    ours: list[dict[str, Any]] = [
        {"row": OURS[True], "memory": "half", "over_bound_ratio": 1.2, "tokens_per_s": 4.0},
        {"row": OURS[True], "memory": "half", "over_bound_ratio": 1.6, "tokens_per_s": 6.0},
        {"row": OURS[False], "memory": "half", "over_bound_ratio": 9.0, "tokens_per_s": 1.0},
        {"row": LLAMA, "memory": "half", "tokens_per_s": 1.0},
        {"row": LLAMA, "memory": "half", "tokens_per_s": 2.0},
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
