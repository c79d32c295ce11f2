"""Models with experts from a checkpoint to tokens: imported, served and streamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from daemon import Daemon, serving
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from flashclient import FlashClient
from flashclient.calibration.calibrate import check_sparse
from flashclient.errors import CalibrationError
from weightd import cli
from weightd.serving.served_models import demand_of
from weightd.store.store import Store
from weightd_proto import weightd_pb2

IDS = torch.arange(3, 31).view(2, 14)


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    """Shared experts beside the routed ones, and a layer without experts."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        max_position_embeddings=64,
        intermediate_size=40,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=44,
        num_experts=12,
        num_experts_per_tok=3,
        mlp_only_layers=[0],
    )
    model: PreTrainedModel = Qwen2MoeForCausalLM(config)
    model.train(False)
    return model


@pytest.fixture(scope="module")
def store(reference: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    reference.save_pretrained(folder / "tensors")
    assert cli.main(["import", str(folder / "tensors"), "--store", str(folder / "store"), "--name", "tiny"]) == 0
    return folder / "store"


@pytest.fixture(scope="module")
def record(store: Path) -> weightd_pb2.Model:
    return Store.open(store, readonly=True).model("tiny")


@pytest.fixture(scope="module")
def daemon(store: Path, record: weightd_pb2.Model) -> Iterator[Daemon]:
    """With memory for half of the FFNs."""
    dram = demand_of(record).minimum_bytes + record.bundles_file_bytes // 2
    with serving(store, "--dram", str(dram), "--cold-start") as daemon:
        yield daemon


def generate(model: Any, ids: torch.Tensor) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return tokens


def test_experts_are_imported_as_ranges_of_whole_cells(record: weightd_pb2.Model) -> None:
    experts = [layer for layer in record.layers if layer.experts]
    assert [(layer.module, layer.experts) for layer in experts] == [
        (f"model.layers.{layer}.mlp.experts", 12) for layer in (1, 2)
    ]
    assert len(record.layers) == 5  # the first layer, and two of shared experts
    assert all(layer.cells % layer.experts == 0 for layer in experts)


def test_a_stored_mixture_passes_verify(store: Path) -> None:
    assert cli.main(["verify", "--store", str(store)]) == 0


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_tokens_are_those_of_transformers(reference: PreTrainedModel, daemon: Daemon, transport: str) -> None:
    with FlashClient("tiny", address=daemon.address, transport=transport) as client:
        assert torch.equal(generate(client.model, IDS), generate(reference, IDS))
        stats = client.stats()
        assert stats.misses > 0
        assert stats.hits > 0


def test_a_row_has_the_same_bits_alone_and_in_a_batch(daemon: Daemon) -> None:
    with FlashClient("tiny", address=daemon.address) as client:
        model: Any = client.model
        with torch.no_grad():
            assert torch.equal(model(IDS).logits[1], model(IDS[1:]).logits[0])


def test_a_token_asks_for_what_its_router_picks(record: weightd_pb2.Model, daemon: Daemon) -> None:
    cells_of = [layer.cells // max(1, layer.experts) * (3 if layer.experts else 1) for layer in record.layers]
    with FlashClient("tiny", address=daemon.address) as client:
        client.generate(IDS[:1, :1], max_new_tokens=1)
        stats = client.stats()
        assert stats.hits + stats.misses == sum(cells_of)
        assert stats.read_bytes == stats.misses * record.bundle.cell_bytes


def test_there_is_nothing_to_predict(daemon: Daemon) -> None:
    with pytest.raises(CalibrationError, match="router picks what is read"):
        FlashClient("tiny", address=daemon.address, mode="predict")
    with FlashClient("tiny", address=daemon.address) as client, pytest.raises(CalibrationError, match="picks experts"):
        check_sparse(client.loaded)
