"""scripts/bench_dense.py: exact mode of a tiny dense model, and the bound it is compared with."""

from __future__ import annotations

import json
from pathlib import Path

import bench_dense
import pytest
import torch
from bench_dense import EXACT, GivenMemory, peer_row, row_of, targets_of
from gguf import GGUFReader
from paper.peers import BESIDE_WEIGHTS_BYTES
from paper.rows import run_row
from planted.dense import EMBEDDING, bytes_of, dense_config, make_dense_model, write_dense_gguf
from planted.plan import SHAPES
from planted.quantised_dense import QUANTISED, quantised_store
from planted.shapes import checkpoint_shapes
from run_here import run_here
from safetensors.torch import load_file
from transformers import LlamaForCausalLM


@pytest.mark.slow
def test_a_run_accounts_for_all_of_the_memory(tmp_path: Path) -> None:
    command = ["bench_dense", "--shape", "llama-tiny", "--folder", str(tmp_path)]
    done = run_here(bench_dense.main, *command, "--json", "--runs", "1", "--tokens", "4", "--no-peers")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (row,) = result["rows"]
    assert row["tokens"] == 3
    assert row["pool_gb"] + row["resident_gb"] + row["tables_gb"] <= row["dram_gb"] * 1.001
    assert row["device_gb_per_s"] > 0
    assert row["missing_gb"] == 0
    assert result["targets"] == [], "all of it fits into the least --dram"


def test_a_quantised_file_runs_in_a_given_memory(tmp_path: Path) -> None:
    made = quantised_store("llama-tiny-q4_k", tmp_path)
    assert {part.encoding.format for part in made.record.bundle.parts} == {"Q4_K"}
    assert abs(made.checkpoint.stat().st_size / QUANTISED["llama-tiny-q4_k"].needed_bytes - 1) < 0.15
    work = GivenMemory(made.checkpoint, made.store, made.name, 8, 1, 3, 0, memory_bytes=2 << 30)
    assert work.dram_bytes(EXACT.memory) == (2 << 30) - BESIDE_WEIGHTS_BYTES
    told = run_row(EXACT, work)
    assert len(told["tokens"]) == 3  # the prompt is one


def test_the_bound_is_what_the_device_needs_for_what_is_missing() -> None:
    token = {"reads": 10.0, "read_bytes": 1.2e9, "reading_s": 1.0, "seconds": 1.5}
    told = {"tokens": [token] * 3, "dram_bytes": 10**9, "dram": {"pool": 10**8, "resident": 8 * 10**8, "tables": 10**7}}
    row = row_of(told, needed_bytes=2 * 10**9, device_gb_per_s=0.8)  # it read 1.2 GB a second itself
    assert (row["missing_gb"], row["resident_gb"]) == (1.0, 0.8)
    targets = {target.name: target for target in targets_of([row])}
    assert targets["exact_over_bound_ratio"].value == pytest.approx(1.5 * 1.2)
    assert targets["exact_read_over_missing_ratio"].value == pytest.approx(1.2)
    assert not any(target.met for target in targets.values())


def test_a_tokens_speed_is_compared_with_that_of_peers() -> None:
    told = {"seconds": [9.0, 2.0, 4.0, 3.0], "read_bytes": [8, 1e9, 2e9, 2e9], "memory_bytes": 2e9}
    peer = peer_row("llama.cpp", told) | {"readahead_kib": 128}
    other = peer_row("neurostream", told) | {"block_rows": 1024}
    slower = peer | {"readahead_kib": 4096, "total_ms_p50": 5000.0}
    assert (peer["tokens"], peer["total_ms_p50"], peer["read_gb_per_token"]) == (3, 3000.0, 2.0)
    ours = {"row": EXACT.name, "total_ms_p50": 1500.0, "over_bound_ratio": 1.1, "read_over_missing_ratio": 1.0}
    *_, target = targets_of([ours, peer, slower, ours, peer, slower])
    assert (target.name, target.value, target.met) == ("exact_over_llama_cpp_ratio", 2.0, True)
    *_, target = targets_of([ours, peer, other | {"total_ms_p50": 750.0}])
    assert (target.name, target.value, target.met) == ("exact_over_neurostream_ratio", 0.5, False)


def test_llama_cpp_gets_the_same_weights(tmp_path: Path) -> None:
    shape = SHAPES["llama-tiny"]
    make_dense_model(shape, tmp_path / "model")
    write_dense_gguf(shape, tmp_path / "model", tmp_path / "gguf" / "model.gguf")
    ids = torch.arange(40)[None]
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    read = LlamaForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(read(ids).logits, expected(ids).logits, atol=1e-2)


def test_neurostream_gets_the_same_weights(tmp_path: Path) -> None:
    shape = SHAPES["llama-tiny"]
    make_dense_model(shape, tmp_path / "model")
    write_dense_gguf(shape, tmp_path / "model", tmp_path / "gguf" / "model.gguf", as_qwen3=True)
    read = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    norms = {f"blk.{layer}.attn_{part}_norm.weight" for layer in range(shape.layers) for part in "qk"}
    assert all(read[name].data.tolist() == [1] * (shape.hidden_size // shape.heads) for name in norms)
    expected = {
        name: tensor for path in (tmp_path / "model").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    assert len(read) == len(expected) + len(norms)
    queries = torch.from_numpy(read["blk.0.attn_q.weight"].data.astype("float32"))
    assert torch.allclose(queries, expected["model.layers.0.self_attn.q_proj.weight"].float(), atol=1e-4), "in order"


def test_a_dense_model_is_whole(tmp_path: Path) -> None:
    make_dense_model(SHAPES["llama-tiny"], tmp_path / "model")
    found = {
        name: tuple(t.shape)
        for path in (tmp_path / "model").glob("*.safetensors")
        for name, t in load_file(path).items()
    }
    config = dense_config(SHAPES["llama-tiny"])
    assert found == checkpoint_shapes(config)
    assert config["hidden_act"] == "silu"
    assert EMBEDDING in found
    assert bytes_of([(2, 3), (4,)]) == 20
