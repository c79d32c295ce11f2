"""Attention modules that became native, against transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from native_models import FUSED, PROMPTS, WORKERS, make
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from flashclient.kernels.decode_attention import use_decode_attention
from flashclient.kernels.fused_attention import FusedAttention, use_fused_attention
from flashclient.kernels.growing_cache import GrowingCache
from flashclient.kernels.resident_linear import use_fast_linears


@pytest.mark.parametrize("kind", FUSED)
def test_logits_are_those_of_transformers(kind: str) -> None:
    native, plain, fused = make(kind)
    assert fused == 2
    mask = (PROMPTS != 0).long()
    caches = [GrowingCache(plain.config), DynamicCache(config=plain.config)]
    outputs = [
        model(PROMPTS, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        for model, cache in zip((native, plain), caches, strict=True)
    ]
    assert torch.allclose(outputs[0], outputs[1], atol=2e-5)
    for step in range(3):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        token = torch.full((2, 1), 30 + step)
        outputs = [
            model(token, attention_mask=mask, past_key_values=cache, use_cache=True).logits
            for model, cache in zip((native, plain), caches, strict=True)
        ]
        assert torch.allclose(outputs[0], outputs[1], atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "opt", "phi"])
def test_rows_depend_on_their_sequence_alone(kind: str, dtype: torch.dtype) -> None:
    native, plain, fused = make(kind, dtype)
    assert fused == 2
    ids = PROMPTS[:1]
    whole = native(ids).logits[0]
    assert torch.allclose(whole.float(), plain(ids).logits[0].float(), atol=0.02 * float(whole.abs().max()))
    cache = GrowingCache(native.config)
    pieces = [
        native(piece, past_key_values=cache, use_cache=True).logits[0] for piece in torch.split(ids, [5, 1, 6], 1)
    ]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(native(ids.repeat(3, 1)).logits[2], whole)


def changed(kind: str, **changes: Any) -> PreTrainedModel:
    native, plain, _ = make(kind, **changes)
    assert torch.allclose(native(PROMPTS).logits, plain(PROMPTS).logits, atol=2e-5)
    return native


def test_what_else_attention_computes_is_not_lost() -> None:
    """Limits and softcaps show only for large inputs."""
    fused = [isinstance(module, FusedAttention) for module in changed("olmo", clip_qkv=0.01).modules()]
    assert not any(fused)
    changed("gemma2", head_dim=16, attn_logit_softcapping=0.05)
    changed("gpt_oss", head_dim=16, num_local_experts=4)


def test_hooks_and_other_weights_are_used() -> None:
    native, plain, _ = make("llama")
    attentions = [model.model.layers[0].self_attn for model in (native, plain)]
    before = native(PROMPTS).logits
    handles = [one.k_proj.register_forward_hook(lambda *arguments: arguments[2] * 2) for one in attentions]
    assert torch.allclose(native(PROMPTS).logits, plain(PROMPTS).logits, atol=2e-5)
    for handle in handles:
        handle.remove()
    assert torch.equal(native(PROMPTS).logits, before)
    for one in attentions:
        one.q_proj = nn.Sequential(one.q_proj, nn.Tanh())
    assert torch.allclose(native(PROMPTS).logits, plain(PROMPTS).logits, atol=2e-5)
    for model in (native, plain):
        model.model.layers[1].self_attn.v_proj.weight = nn.Parameter(torch.ones(32, 64) / 50, requires_grad=False)
    assert torch.allclose(native(PROMPTS).logits, plain(PROMPTS).logits, atol=2e-5)
    copied = copy.deepcopy(native)
    assert torch.equal(copied(PROMPTS).logits, native(PROMPTS).logits)


def test_gradients_and_attentions_are_torchs() -> None:
    native, plain, _ = make("llama")
    embedded = native.get_input_embeddings()(PROMPTS).requires_grad_()
    native(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None
    maps: list[tuple[Tensor, ...]] = []
    for model in (native, plain):
        model.set_attn_implementation("eager")
        maps.append(model(PROMPTS, output_attentions=True).attentions)
    assert torch.allclose(maps[0][1], maps[1][1], atol=1e-5)


class ScaledByPosition(LlamaAttention):
    """Scales queries where the context is long, as Llama 4 does."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        held = kwargs["past_key_values"].get_seq_length() if kwargs.get("past_key_values") is not None else 0
        return super().forward(hidden_states * (1 + held // 8192), position_embeddings, **kwargs)


class WithTensor(LlamaAttention):
    """Passes a tensor to the attention interface, which may differ from layer to layer."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        return super().forward(hidden_states, position_embeddings, s_aux=torch.zeros(4), **kwargs)


class WithBuffer(LlamaAttention):
    """Has a number of its own, which is 1 in this layer."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        return super().forward(hidden_states * self.temperature, position_embeddings, **kwargs)


@pytest.mark.parametrize("kind", [ScaledByPosition, WithTensor, WithBuffer])
def test_what_one_trial_would_not_show_is_found(kind: Any) -> None:
    plain: Any = make("llama")[1]
    for index, layer in enumerate(plain.model.layers):
        layer.self_attn = kind(plain.config, index).requires_grad_(False).eval()
    use_fast_linears(plain, WORKERS)
    use_decode_attention(plain, WORKERS)
    assert use_fused_attention(plain, WORKERS) == 0
