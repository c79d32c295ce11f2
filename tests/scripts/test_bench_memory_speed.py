"""scripts/bench_memory_speed.py: tiny models of each kind that take turns, and what their rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import bench_memory_speed
import gguf
import numpy as np
import pytest
import torch
from checkpoints import make_config, make_model, write_gguf
from memory_speed.models import MeasuredModel, measured_model
from memory_speed.packages import PACKAGED
from memory_speed.rows import row_of, targets_of
from memory_speed.turns import LLAMA, OURS, Worker
from planted.gpt2 import write_gpt2_gguf
from planted.plan import SHAPES
from planted.store import planted_store
from run_here import run_here
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

GIVEN = {  # the modes of the client that are measured
    "llama-tiny": ["exact"],
    "opt-tiny": ["exact", "predict"],
    "olmoe-tiny": ["exact"],
}


@pytest.mark.slow
def test_a_run_without_peers(tmp_path: Path) -> None:
    command = ["bench_memory_speed", "--models", *GIVEN, "--layers", "2"]
    flags = ["--folder", str(tmp_path), "--no-peers", "--rounds", "1", "--tokens", "3", "--prompt-tokens", "20"]
    done = run_here(bench_memory_speed.main, *command, *flags, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = [(name, mode) for name, modes in GIVEN.items() for mode in modes]
    assert [row["row"] for row in result["rows"]] == [f"{OURS}, {mode}" for _, mode in rows]
    assert [row["model"] for row in result["rows"]] == [f"{name}, 2 of 4 layers" for name, _ in rows]
    for row in result["rows"]:
        assert 0 < row["outside_kernels_share"] < 1
        assert row["prompt_s"] > 0
    assert {target["name"] for target in result["targets"]} == {
        f"{what}_{name}" for what in ("messages_per_layer", "outside_kernels_share") for name in GIVEN
    }
    assert result["rows"][0]["messages_per_layer"] == 0, "all of the model is leased after the prompt"


def test_a_packaged_model_has_the_same_numbers_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(_: Path, target: Path) -> None:
        write_gguf(make_model(make_config("llama", hidden=256, neurons=512)), target, lambda _: kind)

    kind = gguf.GGMLQuantizationType.Q4_1
    monkeypatch.setitem(PACKAGED, "smollm2-135m", fetch)
    model = measured_model("smollm2-135m", None, tmp_path)
    path, options = model.loaded()
    read = LlamaForCausalLM.from_pretrained(path, **options)
    stored = model.stored.record
    assert {part.encoding.format for part in stored.bundle.parts} == {"BF16"}
    plain = {tensor.name: tensor for tensor in gguf.GGUFReader(model.gguf()).tensors}
    quantised = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "smollm2-135m.gguf").tensors}
    assert plain.keys() == quantised.keys()
    up = "blk.1.ffn_up.weight"
    rounded = torch.from_numpy(gguf.quants.dequantize(quantised[up].data, kind).copy()).bfloat16()
    assert torch.equal(read.model.layers[1].mlp.up_proj.weight, rounded)
    assert np.array_equal(gguf.quants.dequantize(plain[up].data, plain[up].tensor_type), rounded.float().numpy())
    head_bytes = 0 if read.config.tie_word_embeddings else 2 * read.lm_head.weight.numel()
    needed = sum(one.numel() for name, one in read.named_parameters() if "embed" not in name and "lm_head" not in name)
    embedding_bytes = 2 * read.model.embed_tokens.weight.numel() if head_bytes == 0 else 0
    assert model.token_bytes == {"exact": 2 * needed + head_bytes + embedding_bytes}
    kept = measured_model("smollm2-135m-kept", None, tmp_path)
    assert {part.encoding.format for part in kept.stored.record.bundle.parts} == {"Q4_1"}
    assert kept.gguf().resolve() == (tmp_path / "smollm2-135m.gguf").resolve()
    assert kept.token_bytes["exact"] < model.token_bytes["exact"] * 0.4


@pytest.mark.parametrize("name", ["llama-tiny-q4_0", "olmoe-tiny-q4_0"])
def test_a_model_of_blocks_is_one_file_for_all(tmp_path: Path, name: str) -> None:
    model = measured_model(name, 2, tmp_path)
    assert (model.layers, model.title) == (2, f"{name}, 2 of 4 layers")
    assert model.gguf().resolve() == model.stored.checkpoint.resolve()
    record = model.stored.record
    assert {part.encoding.format for part in record.bundle.parts} == {"Q4_0"}
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(model.gguf()).tensors}
    experts = {name: size for name, size in tensors.items() if "_exps" in name}
    chosen_bytes = sum(experts.values()) // 4  # 4 of 16 are chosen
    needed_bytes = sum(tensors.values()) - tensors["token_embd.weight"] - sum(experts.values()) + chosen_bytes
    assert model.token_bytes["exact"] == pytest.approx(needed_bytes, rel=0.05)


def test_llama_cpp_gets_the_matrices_of_opt(tmp_path: Path) -> None:
    shape = SHAPES["opt-tiny"]
    planted = planted_store("opt-tiny", tmp_path, None, "fp16")
    path = tmp_path / "gguf" / "model.gguf"
    write_gpt2_gguf(shape, planted.checkpoint, path)
    published: dict[str, Any] = {}
    for shard in planted.checkpoint.glob("*.safetensors"):
        published |= load_file(shard)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    of_layer = "model.decoder.layers.1"
    joined = torch.cat([published[f"{of_layer}.self_attn.{one}_proj.weight"] for one in "qkv"])
    assert np.array_equal(tensors["blk.1.attn_qkv.weight"], joined.numpy())
    assert np.array_equal(tensors["blk.1.ffn_down.weight"], published[f"{of_layer}.fc2.weight"].numpy())
    assert np.array_equal(tensors["blk.1.ffn_up.bias"], published[f"{of_layer}.fc1.bias"].float().numpy())
    assert sum(one.size for one in tensors.values()) == sum(one.numel() for one in published.values())


def worker(name: str, seconds: list[float], prompt_s: float, mode: str | None = None) -> Worker:
    return Worker(name, cast(Any, None), mode, seconds, prompt_s=[prompt_s])


def test_rows_are_medians_over_the_turns() -> None:
    exact, predict = worker(OURS, [0.1, 0.5, 0.2], 4.0, "exact"), worker(OURS, [0.05, 0.1, 0.2], 4.0, "predict")
    exact.kernel_share, exact.messages = [0.9, 0.5, 0.8], [0.0, 48.0, 24.0]
    predict.kernel_share, predict.messages = [0.9], [0.0]

    class OfLayers(MeasuredModel):
        layers = 24

    model = OfLayers(
        "m", "m, 24 of 32 layers", cast(Any, None), cast(Any, None), {"exact": 2 * 10**9, "predict": 10**9}, 9
    )
    workers = (exact, predict, worker(LLAMA, [0.16, 0.18, 0.17], 3.0))
    rows = [row_of(one, model, 20.0) for one in workers]
    assert [row["gb_per_s"] for row in rows] == pytest.approx([10, 10, 2 / 0.17])
    assert rows[0]["over_memory_ratio"] == pytest.approx(0.5)
    values = {target.name: target.value for target in targets_of(model, rows)}
    assert values == pytest.approx(
        {
            "messages_per_layer_m": 1,
            "outside_kernels_share_m": 0.2,
            "exact_over_llama_cpp_ratio_m": 0.85,
            "predict_over_llama_cpp_ratio_m": 1.7,
            "prompt_over_llama_cpp_ratio_m": 0.75,
        }
    )
