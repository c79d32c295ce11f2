"""Streamed experts in the place of transformers' own, against transformers' own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cut_model import ArraySource, CutModel
from daemon import serving
from expert_store import cut_experts, opened, store_experts
from mortal_daemon import mortal
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from flashclient._native import Ffn, Workers
from flashclient.errors import AbsentWeightError, OptionError
from flashclient.model.experts_ffn import ExpertsFFN
from flashclient.model.ffn import Clock
from flashclient.model.streamed_experts import LayerExperts
from flashclient.source.bundle_source import BundleSource
from weightd.serving.served_models import demand_of
from weightd_proto.weightd_pb2 import Activation

HIDDEN = 32
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
SILU = Activation(function="silu")


def mixtral() -> tuple[PreTrainedModel, Activation, list[tuple[str, int]]]:
    config = MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2)
    return MixtralForCausalLM(config), SILU, [(f"model.layers.{i}.mlp.experts", 8) for i in range(2)]


def olmoe() -> tuple[PreTrainedModel, Activation, list[tuple[str, int]]]:
    config = OlmoeConfig(**SIZES, intermediate_size=24, num_experts=16, num_experts_per_tok=4)
    return OlmoeForCausalLM(config), SILU, [(f"model.layers.{i}.mlp.experts", 16) for i in range(2)]


def qwen2_moe() -> tuple[PreTrainedModel, Activation, list[tuple[str, int]]]:
    """Shared experts beside the routed ones, and a layer without experts."""
    config = Qwen2MoeConfig(
        **SIZES,
        intermediate_size=40,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=44,
        num_experts=12,
        num_experts_per_tok=3,
        mlp_only_layers=[0],
    )
    ffns = [("model.layers.0.mlp", 0), ("model.layers.1.mlp.experts", 12), ("model.layers.1.mlp.shared_expert", 0)]
    return Qwen2MoeForCausalLM(config), SILU, ffns


def gpt_oss() -> tuple[PreTrainedModel, Activation, list[tuple[str, int]]]:
    """Biases, clamps and interleaved, transposed matrices."""
    config = GptOssConfig(**SIZES, head_dim=8, intermediate_size=32, num_local_experts=8, num_experts_per_tok=2)
    model = GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(parameter, std=1.0 if "bias" in name else 0.4)
    activation = Activation(function="swish", parameter=1.702, gate_max=7.0, up_limit=7.0, up_offset=1.0)
    return model, activation, [(f"model.layers.{i}.mlp.experts", 8) for i in range(2)]


FAMILIES = [mixtral, olmoe, qwen2_moe, gpt_oss]


class Called(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *arguments: Tensor) -> Tensor:
        return self._function(*arguments)


class Mixture:
    """A tiny model, as transformers has it and cut into bundles."""

    def __init__(self, make: Any = olmoe, dtype: torch.dtype = torch.float32, read_bytes: int = 2048) -> None:
        torch.manual_seed(0)
        model, self.activation, self.ffns = make()
        self.reference = model.to(dtype).eval().requires_grad_(False)
        self.cut: CutModel = cut_experts(self.reference, self.ffns, read_bytes)

    def ffn(self, source: BundleSource, threads: int = 2) -> ExpertsFFN:
        parts = [part.encoding for part in self.cut.record.bundle.parts]
        kernels = Ffn(Workers(threads), parts, HIDDEN, self.activation)
        return ExpertsFFN(source, [kernels] * len(self.cut.record.layers), self.cut.record.layers, HIDDEN, Clock())

    def array_source(self) -> ArraySource:
        return ArraySource(self.cut, [7], self.cut.record.bundle.bundles_per_cell)

    def streamed(self, source: BundleSource) -> PreTrainedModel:
        """A copy of the model with streamed FFNs."""
        model: PreTrainedModel = copy.deepcopy(self.reference)
        ffn = self.ffn(source)
        for layer, (path, experts) in enumerate(self.ffns):
            parent, _, name = path.rpartition(".")
            module: Any = model.get_submodule(path)
            function = self.experts(ffn, layer, module) if experts else partial(self.dense, ffn, layer)
            setattr(model.get_submodule(parent), name, Called(function))
        return model

    def dense(self, ffn: ExpertsFFN, layer: int, x: Tensor) -> Tensor:
        return ffn(layer, x.reshape(-1, HIDDEN).float(), None).view(x.shape).to(x.dtype)

    def experts(self, ffn: ExpertsFFN, layer: int, module: Any) -> LayerExperts:
        if not module.has_bias:
            return LayerExperts(ffn, layer, module.num_experts)
        bias = module.gate_up_proj_bias.float()
        by_part = torch.stack([bias[:, ::2].flatten(), bias[:, 1::2].flatten()]).numpy()
        biases = np.ascontiguousarray(by_part[:, self.cut.placements[layer]])
        return LayerExperts(ffn, layer, module.num_experts, biases, module.down_proj_bias)


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture()


def picks_of(tokens: int, experts: int, picks: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, indices and weights of so many tokens."""
    random = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts, generator=random)[:picks] for _ in range(tokens)])
    weights = torch.rand(tokens, picks, generator=random)
    return torch.randn(tokens, HIDDEN, generator=random), index, weights


@pytest.mark.parametrize("make", FAMILIES)
def test_logits_and_tokens_are_those_of_transformers(make: Any) -> None:
    mixture = Mixture(make)
    source = mixture.array_source()
    model: Any = mixture.streamed(source)
    reference: Any = mixture.reference
    ids = torch.randint(0, 100, (3, 20), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=2e-4, rtol=2e-4)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **arguments), reference.generate(ids, **arguments))
    assert not source.cells.held


def test_a_row_depends_on_itself_alone(mixture: Mixture) -> None:
    x, index, weights = picks_of(40, 16, 4)
    source = mixture.array_source()
    experts = LayerExperts(mixture.ffn(source), 1, 16)
    together = experts(x, index, weights)
    for rows in (slice(0, 1), slice(3, 7), slice(5, 40)):
        assert torch.equal(experts(x[rows], index[rows], weights[rows]), together[rows])
    source.cells.limit, source.cells.share = 6, 4
    assert torch.equal(experts(x, index, weights), together)
    source.cells.refusals, source.cells.limit = 3, 100
    assert torch.equal(experts(x[:2], index[:2], weights[:2]), together[:2])
    one_thread = LayerExperts(mixture.ffn(mixture.array_source(), threads=1), 1, 16)
    assert torch.equal(one_thread(x, index, weights), together)


def test_only_picked_experts_are_leased(mixture: Mixture) -> None:
    source = mixture.array_source()
    experts = LayerExperts(mixture.ffn(source), 0, 16)
    x, _, weights = picks_of(2, 16, 4)
    weights[0, 2] = 0
    experts(x, torch.tensor([[3, 11, 7, -1], [11, 3, 3, 16]]), weights)
    cells = mixture.cut.record.layers[0].cells // 16
    wanted = {(0, expert * cells + i) for expert in (3, 11) for i in range(cells)}
    assert set(source.cells.acquired) == wanted
    assert len(source.cells.acquired) == len(wanted)
    assert cells == 4


def test_picks_that_name_no_expert_count_for_nothing(mixture: Mixture) -> None:
    experts = LayerExperts(mixture.ffn(mixture.array_source()), 0, 16)
    x, index, weights = picks_of(3, 16, 3)
    more = torch.cat([index, torch.tensor([[16], [-1], [1000]])], 1), torch.cat([weights, torch.ones(3, 1)], 1)
    assert torch.equal(experts(x, *more), experts(x, index, weights))
    assert not experts(x, torch.full_like(index, 16), weights).any()


def test_rows_that_lie_by_expert(mixture: Mixture) -> None:
    """As Llama 4 calls its experts."""
    source = mixture.array_source()
    experts = LayerExperts(mixture.ffn(source), 0, 16)
    x, _, _ = picks_of(16 * 3, 16, 1)
    x[3:6] = x[7] = 0
    index = torch.arange(16).repeat_interleave(3).unsqueeze(1)
    assert torch.equal(experts(x), experts(x, index, torch.ones(48, 1)))
    assert not experts(x)[3:6].any()
    source.cells.acquired.clear()
    experts(x)
    assert {cell // 4 for _, cell in source.cells.acquired} == set(range(16)) - {1}


def test_shapes_and_dtypes_of_all_callers(mixture: Mixture) -> None:
    experts = LayerExperts(mixture.ffn(mixture.array_source()), 0, 16)
    x, index, weights = picks_of(6, 16, 4)
    expected = experts(x, index, weights)
    shaped = experts(x.view(2, 3, -1), top_k_index=index.to(torch.int32).view(2, 3, 4), top_k_weights=weights)
    assert torch.equal(shaped, expected.view(2, 3, -1))
    half = experts(x.bfloat16(), index, weights.double())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert experts(x, index, weights).dtype == torch.bfloat16
    assert experts(x[:0], index[:0], weights[:0]).shape == (0, HIDDEN)
    with pytest.raises(AbsentWeightError, match="no gradient"):
        experts(x.requires_grad_(), index, weights).sum().backward()  # type: ignore[no-untyped-call]


def test_a_lost_weightd_changes_no_bit(mixture: Mixture) -> None:
    source = mixture.array_source()
    experts = LayerExperts(mixture.ffn(source), 0, 16)
    arguments = picks_of(5, 16, 4)
    expected = experts(*arguments)
    source.losses = 2
    assert torch.equal(experts(*arguments), expected)
    assert len(source.reattached) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_transports_and_pools_give_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    mixture = Mixture(qwen2_moe, dtype)
    store_experts(mixture.cut, tmp_path / "store")
    ids = torch.randint(0, 100, (2, 15), generator=torch.Generator().manual_seed(1))
    model: Any = mixture.streamed(mixture.array_source())
    expected, decoded = model(ids).logits, model(ids[:, :1]).logits
    for dram in (demand_of(mixture.cut.record).minimum_bytes, 8 << 20):
        with serving(tmp_path / "store", "--dram", str(dram)) as daemon:
            for transport, pool_bytes in (("ring", None), ("grpc", None), ("grpc", 40_000)):
                with opened(daemon.address, transport, pool_bytes) as source:
                    streamed: Any = mixture.streamed(source)
                    for _ in range(2):
                        assert torch.equal(streamed(ids).logits, expected), (dram, transport)
                        assert torch.equal(streamed(ids[:, :1]).logits, decoded), (dram, transport)
                    assert source.counters().hits + source.counters().misses > 0
                    source.idle()


def test_experts_in_the_pool_are_not_read_again(tmp_path: Path) -> None:
    mixture = Mixture(olmoe)
    store_experts(mixture.cut, tmp_path / "store")
    with serving(tmp_path / "store", "--dram", "16MiB") as daemon:
        for transport in ("ring", "grpc"):
            with opened(daemon.address, transport) as source:
                experts = LayerExperts(mixture.ffn(source), 0, 16)
                x, index, weights = picks_of(1, 16, 4)
                before = source.counters()
                first = experts(x, index, weights)
                read = source.counters().since(before)
                assert torch.equal(experts(x, index, weights), first)
                again = source.counters().since(before).since(read)
                assert (read.hits, read.misses) == (0, 16)
                kept = transport == "ring"  # which needs no message then
                assert (again.hits, again.misses) == (0 if kept else 16, 0)


def test_a_weightd_that_dies_and_comes_back(tmp_path: Path) -> None:
    mixture = Mixture(olmoe)
    store_experts(mixture.cut, tmp_path / "store")
    arguments = picks_of(5, 16, 4)
    expected = LayerExperts(mixture.ffn(mixture.array_source()), 0, 16)(*arguments)
    with mortal(tmp_path / "store") as daemon:
        for transport in ("ring", "grpc"):
            with opened(daemon.address, transport) as source:
                experts = LayerExperts(mixture.ffn(source), 0, 16)
                assert torch.equal(experts(*arguments), expected)
                daemon.restart()
                assert torch.equal(experts(*arguments), expected)


def test_a_pool_that_holds_no_two_cells_is_refused(tmp_path: Path) -> None:
    mixture = Mixture(olmoe)
    store_experts(mixture.cut, tmp_path / "store")
    refused = pytest.raises(OptionError, match="two cells of this model")
    with serving(tmp_path / "store") as daemon, refused, opened(daemon.address, "grpc", 4000):
        pass
