"""Native attention with softcaps and sinks, and of models that ask for the name of their attention."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from instruction_sets import AVAILABLE
from native_models import PROMPTS, WORKERS, make
from torch import Tensor, nn

from flashclient._native import Attention
from flashclient.kernels.decode_attention import (
    IMPLEMENTATION,
    OF_OWN_IMPLEMENTATION,
    own_attention,
    use_decode_attention,
)
from flashclient.kernels.dtypes import KERNEL_DTYPES
from flashclient.kernels.growing_cache import GrowingCache

SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
SPARSE = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Types whose class has no sdpa, and what makes them small.
OWN: dict[str, dict[str, Any]] = {
    "gpt_oss": {"head_dim": 16, **SLIDING, **SPARSE},
    "gemma2": {"head_dim": 16, **SLIDING, "attn_logit_softcapping": 1.5},
    "vaultgemma": {"head_dim": 16, **SLIDING, "attn_logit_softcapping": 1.5},
    "granite_swa": SLIDING,
}
# Types that mask all but what an index picked, where they know the name of the implementation.
LATENT: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
}
INDEXED = ("deepseek_v32", "glm_moe_dsa")
INDEX: dict[str, Any] = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16, "num_key_value_heads": 4}


def own_models(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The native model and transformers'; sinks that matter."""
    native, plain, _ = make(kind, dtype, **OWN[kind])
    for model in (native, plain):
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.linspace(-1, 2, len(parameter)))
            elif name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(8)  # scores that are far from each other
    assert (plain.config._attn_implementation, type(native.config._attn_implementation)) == (
        "eager",
        type(IMPLEMENTATION),
    )
    return native, plain


@pytest.mark.parametrize("kind", OWN)
def test_logits_are_those_of_transformers(kind: str) -> None:
    native, plain = own_models(kind)
    mask = (PROMPTS != 0).long()
    caches: list[Any] = [GrowingCache(native.config), None]
    for ids in (PROMPTS, torch.tensor([[30], [31]]), torch.tensor([[32, 33], [34, 35]])):
        mask = mask if ids is PROMPTS else torch.cat([mask, torch.ones_like(ids)], 1)
        outs = [
            model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            for model, cache in zip((native, plain), caches, strict=True)
        ]
        caches = [out.past_key_values for out in outs]
        seen = mask[:, -ids.shape[1] :].bool()
        assert torch.allclose(outs[0].logits[seen], outs[1].logits[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("kind", OWN)
def test_rows_depend_on_their_sequence_alone(kind: str, dtype: torch.dtype) -> None:
    native, _ = own_models(kind, dtype)
    seen: list[Tensor] = []
    native.model.layers[0].self_attn.register_forward_hook(lambda module, given, output: seen.append(output[0][0]))
    ids = PROMPTS[:1]
    native(ids)
    whole = seen.pop()
    cache = GrowingCache(native.config)
    for piece in torch.split(ids, [5, 1, 6], 1):
        native(piece, past_key_values=cache, use_cache=True)
    assert torch.equal(torch.cat(seen), whole)
    padded, mask = torch.cat([ids.new_zeros(1, 3), ids], 1), torch.tensor([[0] * 3 + [1] * ids.shape[1]])
    native(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    assert torch.equal(seen.pop()[3:], whole)


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2"])
def test_weights_masks_and_gradients_are_those_of_transformers(kind: str) -> None:
    native, plain = own_models(kind)
    ids = PROMPTS[:1]
    one, other = (model(ids, output_attentions=True).attentions for model in (native, plain))
    assert len(one) == len(other) == 2
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))
    for mask in (torch.ones(1, 1, 12, 12).tril().bool(), torch.randn(1, 1, 12, 12)):  # whatever a user gives
        made, expected = (model(ids, attention_mask=mask).logits for model in (native, plain))
        assert torch.allclose(made, expected, rtol=1e-4, atol=1e-4)
    gradients = []
    for model in (native, plain):
        weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
        model(ids).logits.square().sum().backward()
        gradients.append(weight.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize("causal", [False, True])
def test_softcaps_and_sinks_are_the_formula(instruction_set: str, causal: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 37, 24) for heads in (6, 2, 2))
    sinks = torch.randn(6) * 3
    out = torch.empty(2, 37, 6, 24)
    kernel = Attention(WORKERS, "F32", instruction_set)
    query_rows, key_rows, value_rows = (one.numpy() for one in (query, key, value))
    kernel.attend(query_rows, key_rows, value_rows, None, causal, 2.0, out.numpy(), softcap=1.5, sinks=sinks.numpy())
    scores = query.double() @ key.double().repeat_interleave(3, 1).transpose(2, 3) * 2.0
    scores = 1.5 * (scores / 1.5).tanh()
    if causal:
        scores = scores.masked_fill(~torch.ones(37, 37, dtype=torch.bool).tril(), -torch.inf)
    weights = torch.cat([scores, sinks.double().view(1, 6, 1, 1).expand(2, 6, 37, 1)], 3).softmax(-1)[..., :-1]
    expected = (weights @ value.double().repeat_interleave(3, 1)).transpose(1, 2)
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_sink_of_another_shape_is_refused() -> None:
    one = torch.zeros(1, 2, 1, 8).numpy()
    with pytest.raises(ValueError, match="one of each of 2 heads, not 8"):
        Attention(WORKERS, "F32").attend(
            one, one, one, None, False, 1.0, one.transpose(0, 2, 1, 3).copy(), sinks=one[0, 0, 0]
        )


def other_formula(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                  scaling: float, dropout: float = 0.0, **kwargs: Any) -> tuple[Tensor, None]:  # fmt: skip
    """Attention that no kernel knows."""
    return value.mean(2, keepdim=True).expand_as(query).transpose(1, 2), None


@pytest.mark.parametrize("change", ["formula", "argument"])
def test_what_is_not_proven_stays_transformers_own(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain, _ = make("gpt_oss", **OWN["gpt_oss"])
    module = plain.model.layers[0].self_attn
    found = own_attention(module)
    assert found is not None
    if change == "formula":
        monkeypatch.setattr("transformers.models.gpt_oss.modeling_gpt_oss.eager_attention_forward", other_formula)
    else:

        def more(*args: Any, indices: Tensor | None = None, **kwargs: Any) -> Any:
            return found.function(*args, **kwargs)

        monkeypatch.setattr("transformers.models.gpt_oss.modeling_gpt_oss.eager_attention_forward", more)
    assert use_decode_attention(plain, WORKERS) == 0
    assert plain.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", INDEXED)
def test_what_an_index_did_not_pick_is_left_out(kind: str) -> None:
    native, plain, _ = make(kind, **LATENT, **EXPERTS, **INDEX)
    assert native.config._attn_implementation is IMPLEMENTATION
    made, expected = (model(PROMPTS[:1]).logits for model in (native, plain))
    assert torch.allclose(made, expected, rtol=1e-4, atol=1e-4)


def test_names_are_taken_for_those_that_models_know() -> None:
    for name, like in ((IMPLEMENTATION, "sdpa"), (OF_OWN_IMPLEMENTATION, "eager")):
        assert name in ("eager", "sdpa")
        assert name == like
        assert name != like  # so that what a user sets is set
        assert {like: 1}.get(name) is None
        for copied in (copy.deepcopy(name), pickle.loads(pickle.dumps(name))):
            assert (type(copied), copied == like, str(copied)) == (type(name), True, str(name))
