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
from flashclient.kernels.resident_router import NativeRouter, use_native_routers
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
