"""Models of many kinds, imported from their published tensors and run on what the store holds: transformers' logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_configs
import torch
from cut_model import ArraySource, CutModel
from stored_model import read_bundles
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flashclient._native import Workers
from flashclient.model.build import build_model
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store
from weightd.store.verify import verify_model

TOLERANCE = 1e-3  # of the largest logit
SIZES = tiny_configs.SIZES | {"num_hidden_layers": 3}
DENSE = tiny_configs.DENSE | SIZES
MIXTURE = DENSE | {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
KINDS: dict[str, dict[str, Any]] = {
    "deepseek_v3": DENSE | LATENT | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "falcon": SIZES | {"num_kv_heads": 2, "new_decoder_architecture": True},
    "gpt2": {"vocab_size": 320, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_oss": MIXTURE,
    "mixtral": MIXTURE,
    "olmoe": MIXTURE,
    "phi3": DENSE,
    "qwen2_moe": MIXTURE,
}


def make(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **KINDS[kind])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.1 * torch.randn(parameter.shape))
    return model.eval()  # type: ignore[no-any-return,no-untyped-call]


def stored(store: Store, name: str) -> CutModel:
    record = store.model(name)
    layers = range(len(record.layers))
    bundles = [torch.stack([torch.from_numpy(b) for b in read_bundles(store, record, i)]).numpy() for i in layers]
    placements = [store.placement(name, layer) for layer in layers]
    return CutModel(record, bundles, placements, store.resident_path(name).read_bytes(), {})


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    dense = make(kind)
    dense.save_pretrained(tmp_path / "m")
    with Store.open(tmp_path / "store", create=True) as store:
        record = import_checkpoint(tmp_path / "m", store)
        verify_model(store, "m")
        parts = stored(store, "m")
        assert any(layer.experts for layer in record.layers) == ("num_experts_per_tok" in KINDS[kind])
        for layer in record.layers:
            assert (
                layer.neurons // max(1, layer.experts) % (record.bundle.bundles_per_cell if layer.experts else 1) == 0
            )
        source: Any = ArraySource(parts, [61])
        built = build_model(parts.record, store.files_path("m"), source, parts.placements.__getitem__, Workers(1)).model
    ids = torch.arange(3, 27).unsqueeze(0)
    with torch.no_grad():
        expected, actual = dense(ids).logits, built(ids).logits
    assert (actual - expected).abs().max() < TOLERANCE * expected.abs().max()
