"""Native routers pick what transformers' do, and each row as if it were alone; blocks with more than experts are told
apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native_models import SIZES, WORKERS
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from flashclient.kernels.mixtures import Mixture, mixture_of
from flashclient.kernels.resident_linear import use_fast_linears
from flashclient.kernels.resident_router import NativeRouter, RouterByRow, use_native_routers
from flashclient.kernels.trials import same_but_for_rounding

EXPERTS: dict[str, Any] = {"num_experts_per_tok": 3, "num_hidden_layers": 1}
KINDS: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 12}, "mixtral": {"num_local_experts": 12},
    "qwen3_moe": {"num_experts": 12, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 12, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 12, "head_dim": 16},
}  # fmt: skip
ARE_NOTHING_ELSE = {"olmoe", "mixtral", "qwen3_moe"}


def block_of(kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A block with experts, whose router is native."""
    config = AutoConfig.for_model(kind, **(SIZES | EXPERTS | KINDS[kind]))
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    assert use_native_routers(model, WORKERS) == 1
    block = model.model.layers[0].mlp
    return block, next(one for one in block.modules() if isinstance(one, NativeRouter))


def rows_of(count: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_picks_are_those_of_transformers_and_rows_are_alone(kind: str, dtype: torch.dtype) -> None:
    _, router = block_of(kind, dtype)
    kinds: tuple[Any, ...] = type(router).__mro__
    own = kinds[kinds.index(NativeRouter) + 2].forward  # after Native
    x = rows_of(40, dtype)
    logits, weights, picks = router(x)
    expected_logits, expected_weights, expected_picks = own(router, x)
    assert weights.dtype == expected_weights.dtype
    assert same_but_for_rounding(logits, expected_logits)
    if dtype == torch.float32:
        assert torch.equal(picks, expected_picks)
        assert same_but_for_rounding(weights, expected_weights)
    for row in (0, 17, 39):
        alone = router(x[row : row + 1])
        assert all(
            torch.equal(one[0], of_all[row]) for one, of_all in zip(alone, (logits, weights, picks), strict=True)
        )


def test_the_lower_of_two_experts_with_the_same_logit_is_picked() -> None:
    _, router = block_of("olmoe", torch.float32)
    router.weight = nn.Parameter(router.weight[:1].repeat(12, 1), requires_grad=False)
    _, weights, picks = router(rows_of(2, torch.float32))
    assert picks.tolist() == [[0, 1, 2]] * 2
    assert torch.equal(weights, torch.full((2, 3), 1 / 12))


def test_changed_weights_are_used_and_gradients_are_torchs() -> None:
    _, router = block_of("olmoe", torch.float32)
    x = rows_of(2, torch.float32)
    before = router(x)[0]
    router.weight = nn.Parameter(router.weight * 2, requires_grad=False)
    assert torch.equal(router(x)[0], before * 2)
    x.requires_grad_()
    router(x)[0].sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_a_mixture_if_it_is_nothing_else(kind: str) -> None:
    block, _ = block_of(kind, torch.bfloat16)
    wanted = Mixture("gate", "experts") if kind in ARE_NOTHING_ELSE else None
    assert mixture_of(block, type(block.experts)) == wanted
    assert mixture_of(block, nn.Embedding) is None


def test_a_block_that_scales_its_output_is_none() -> None:
    block, _ = block_of("olmoe", torch.bfloat16)
    own = block.forward

    def scaled(hidden_states: Tensor) -> Tensor:
        result: Tensor = own(hidden_states) * 1.01
        return result

    block.__dict__["forward"] = scaled
    assert mixture_of(block, type(block.experts)) is None


GROUPED: dict[str, Any] = {"n_routed_experts": 12, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1}
LATENT: dict[str, Any] = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
# Types whose routers no kernel computes: by groups, sigmoids, with a bias that the block gives, and other formulas.
BY_ROW: dict[str, dict[str, Any]] = {
    "deepseek_v3": GROUPED | LATENT | {"v_head_dim": 16, "first_k_dense_replace": 0, "num_key_value_heads": 4},
    "glm4_moe": GROUPED | {"first_k_dense_replace": 0},
    "minimax_m2": {"num_local_experts": 12, "head_dim": 16},
    "phimoe": {"num_local_experts": 12, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 12, "head_dim": 16, "intermediate_size_mlp": 96},
    "ernie4_5_moe": {"moe_num_experts": 12, "moe_layer_start_index": 0, "moe_intermediate_size": 32},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BY_ROW)
def test_rows_of_other_routers_are_alone(kind: str, dtype: torch.dtype) -> None:
    config = AutoConfig.for_model(kind, **(SIZES | EXPERTS | BY_ROW[kind]))
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    use_fast_linears(model, WORKERS)
    assert use_native_routers(model, WORKERS) == 1
    (router,) = (one for one in model.modules() if isinstance(one, RouterByRow))
    vectors = [torch.randn(12)] if kind == "minimax_m2" else []
    x = rows_of(41, dtype)
    whole = router(x, *vectors)
    own = type(router).__mro__[3].forward  # type: ignore[attr-defined]  # after RouterByRow and Native
    for made, expected in zip(whole, own(router, x, *vectors), strict=True):
        if dtype == torch.float32 or not made.is_floating_point():
            assert (made == expected).float().mean() > 0.9 or same_but_for_rounding(made, expected)
    for row in (0, 17, 40):
        for made, alone in zip(whole, router(x[row : row + 1], *vectors), strict=True):
            assert torch.equal(made[row : row + 1], alone)
