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

from flashclient._native import AttentionInputs, AttentionProjection
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


def test_angles_of_other_shapes_are_refused() -> None:
    """The kernel reads both with the strides of one."""
    kernel = AttentionInputs(WORKERS, "F32")
    projection = AttentionProjection(torch.zeros(16, 8).numpy(), None, None)
    x, out = torch.zeros(2, 3, 8).numpy(), [torch.zeros(2, 1, 3, 16).numpy() for _ in range(3)]
    cos, sin = torch.zeros(2, 3, 16).numpy(), torch.zeros(1, 3, 16).numpy()
    kernel.compute(projection, projection, projection, "halves", x, cos, cos, *out)
    for angles in ((cos, sin), (sin, cos)):
        with pytest.raises(ValueError, match="must have the same shape"):
            kernel.compute(projection, projection, projection, "halves", x, *angles, *out)


class AttendsElsewhere(LlamaAttention):
    """Adds another argument, if it is given."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        elsewhere: Any = None,
        **rest: Any,
    ) -> Any:
        made, weights = super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **rest)
        return (made if elsewhere is None else made + elsewhere), weights


def test_an_argument_that_was_not_tried_is_not_lost() -> None:
    plain: Any = make("llama")[1]
    attention = AttendsElsewhere(plain.config, 0).requires_grad_(False).eval()
    plain.model.layers[0].self_attn = attention
    use_fast_linears(plain, WORKERS)
    use_decode_attention(plain, WORKERS)
    assert use_fused_attention(plain, WORKERS) == 2
    x, angles = torch.randn(1, 3, 64), (torch.ones(1, 3, 16), torch.zeros(1, 3, 16))
    made = [attention(hidden_states=x, position_embeddings=angles, elsewhere=one)[0] for one in (None, 1.0)]
    assert torch.allclose(made[1], made[0] + 1)


class Changed(LlamaAttention):
    """Passes its arguments on."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **rest: Any,
    ) -> Any:
        x = self.changed(hidden_states, past_key_values)
        return super().forward(x, position_embeddings, attention_mask, past_key_values, **(rest | self.added()))

    def changed(self, x: Tensor, cache: Any) -> Tensor:
        return x

    def added(self) -> dict[str, Any]:
        return {}


class ScaledByPosition(Changed):
    """Scales its input where the context is long, as Llama 4 does."""

    def changed(self, x: Tensor, cache: Any) -> Tensor:
        return x * (1 + (cache.get_seq_length() if cache is not None else 0) // 8192)


class WithTensor(Changed):
    """Passes a tensor to the attention interface, which may differ from layer to layer."""

    def added(self) -> dict[str, Any]:
        return {"s_aux": torch.zeros(4)}


class WithBuffer(Changed):
    """Has a number of its own, which is 1 in this layer."""

    temperature: Tensor

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.register_buffer("temperature", torch.ones(()))

    def changed(self, x: Tensor, cache: Any) -> Tensor:
        return x * self.temperature


@pytest.mark.parametrize(("kind", "fused"), [(Changed, 2), (ScaledByPosition, 0), (WithTensor, 0), (WithBuffer, 0)])
def test_what_one_trial_would_not_show_is_found(kind: Any, fused: int) -> None:
    plain: Any = make("llama")[1]
    for index, layer in enumerate(plain.model.layers):
        layer.self_attn = kind(plain.config, index).requires_grad_(False).eval()
    use_fast_linears(plain, WORKERS)
    use_decode_attention(plain, WORKERS)
    assert use_fused_attention(plain, WORKERS) == fused
