"""Native decoder layers give the bits of the layers' own forward, with native parts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from native_calls import attending_layers
from native_models import FUSED, PROMPTS, WORKERS, make
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from flashclient.kernels.decoder_layer import use_native_layers
from flashclient.kernels.growing_cache import GrowingCache
from flashclient.kernels.resident_norm import NativeNorm
from flashclient.model.ffn import StreamedFFN

LAYERS = [kind for kind in FUSED if kind not in ("olmo", "opt", "phi", "stablelm")]  # others have another wiring
MASK = (PROMPTS != 0).long()


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers that went the native way, one entry a call."""
    return attending_layers(monkeypatch)


def models(kind: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with native layers, and one whose layers have native parts."""
    native, _, _ = make(kind, dtype)
    parts = copy.deepcopy(native)
    assert use_native_layers(native, WORKERS, StreamedFFN) == 2
    return native, parts


def generated(model: Any, cache: Any, steps: int = 14) -> Tensor:
    """The logits of a prompt with padding, then of a few tokens in passes of one and of three."""
    logits = [model(PROMPTS, attention_mask=MASK, past_key_values=cache, use_cache=True).logits]
    mask = MASK
    for step in range(steps):
        tokens = torch.full((2, 3 if step % 4 == 3 else 1), 30 + step)
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        logits.append(model(tokens, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_bits_are_those_of_the_layers_own_forward(kind: str, dtype: torch.dtype, native_calls: list[Any]) -> None:
    native, parts = models(kind, dtype)
    native_calls.clear()  # of the proof
    made = generated(native, GrowingCache(native.config))
    as_bfloat16 = kind != "olmo2" or dtype == torch.float32  # OLMo 2 rotates in fp32
    assert bool(native_calls) == as_bfloat16
    assert torch.equal(made, generated(parts, DynamicCache(config=parts.config)))
    assert torch.equal(native(PROMPTS[:1], use_cache=False).logits, parts(PROMPTS[:1], use_cache=False).logits)


def test_other_caches_hooks_and_gradients_go_the_layers_own_way(native_calls: list[Any]) -> None:
    native, parts = models("llama")
    native_calls.clear()
    expected = generated(parts, DynamicCache(config=parts.config))
    assert torch.equal(generated(native, DynamicCache(config=native.config)), expected)
    assert not native_calls
    seen: list[Tensor] = []
    layer: Any = native.model.layers[0]
    for module in (layer.self_attn, layer.input_layernorm, layer.self_attn.k_proj, layer.self_attn.o_proj):
        seen.clear()
        handle = module.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
        assert torch.equal(generated(native, GrowingCache(native.config)), expected)
        assert len(seen) == 15
        handle.remove()
    assert layer not in native_calls
    embedded = native.get_input_embeddings()(PROMPTS).requires_grad_()
    native(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    assert embedded.grad is not None


def test_hooks_of_a_layer_and_of_its_ffn_are_called(native_calls: list[Any]) -> None:
    native, parts = models("llama")
    native_calls.clear()
    outputs: list[Tensor] = []
    for model in (native, parts):
        layer: Any = model.model.layers[1]
        layer.mlp.register_forward_hook(lambda module, given, output: output * 2)
        layer.register_forward_hook(lambda module, given, output: output + 1)
        cache = GrowingCache(model.config)
        outputs.append(model(PROMPTS, attention_mask=MASK, past_key_values=cache).logits)
    assert len(native_calls) == 2
    assert torch.equal(outputs[0], outputs[1])
    hidden = [model(PROMPTS, output_hidden_states=True, use_cache=False).hidden_states for model in (native, parts)]
    assert all(torch.equal(one, other) for one, other in zip(*hidden, strict=True))


def test_changed_weights_are_used_and_copies_work() -> None:
    native, parts = models("gemma3_text")
    for model in (native, parts):
        layer: Any = model.model.layers[0]
        layer.self_attn.o_proj.weight = nn.Parameter(layer.self_attn.o_proj.weight * 1.5, requires_grad=False)
        layer.pre_feedforward_layernorm.weight.add_(0.25)
    expected = generated(parts, GrowingCache(parts.config))
    assert torch.equal(generated(native, GrowingCache(native.config)), expected)
    assert torch.equal(generated(copy.deepcopy(native), GrowingCache(native.config)), expected)


def test_norms_that_were_alike_in_the_trial_are_told_apart() -> None:
    """GLM 4 names two of them in another order than it uses them."""
    parts: Any = make("glm4", head_dim=16)[0]
    norms = [one for one in parts.modules() if isinstance(one, NativeNorm)]
    for norm in norms:
        norm._parameters["weight"].fill_(1)  # type: ignore[union-attr]
    native = copy.deepcopy(parts)
    assert use_native_layers(native, WORKERS, StreamedFFN) == 2
    for model in (native, parts):
        torch.manual_seed(1)
        for norm in (one for one in model.modules() if isinstance(one, NativeNorm)):
            norm._parameters["weight"].normal_()  # type: ignore[union-attr]
    expected = generated(parts, DynamicCache(config=parts.config))
    assert torch.equal(generated(native, GrowingCache(native.config)), expected)


def test_collected_hidden_states_do_not_end_the_native_way(native_calls: list[Any]) -> None:
    native, parts = models("llama")
    native(PROMPTS, output_hidden_states=True, use_cache=False)
    native_calls.clear()
    made = generated(native, GrowingCache(native.config), steps=2)
    assert len(native_calls) == 6
    assert torch.equal(made, generated(parts, DynamicCache(config=parts.config), steps=2))


class Doubling(nn.Module):
    """Stands in the place of a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_replaced_norms_and_computed_weights_are_used() -> None:
    native, parts = models("gemma3_text")
    for model in (native, parts):
        layers: Any = model.model.layers
        first, second = layers
        first.post_feedforward_layernorm = nn.Identity()
        nn.utils.parametrize.register_parametrization(second.self_attn.o_proj, "weight", Doubling())
        nn.utils.parametrize.register_parametrization(second.input_layernorm, "weight", Doubling())
    expected = generated(parts, DynamicCache(config=parts.config), steps=2)
    assert torch.equal(generated(native, GrowingCache(native.config), steps=2), expected)


def test_gradients_reach_what_a_cache_holds(native_calls: list[Any]) -> None:
    native, _ = models("llama")
    native_calls.clear()
    cache = GrowingCache(native.config)
    prompt = torch.randn(2, 2, 3, 16, requires_grad=True)
    layers: Any = cache.layers
    for layer in layers:
        layer.update(prompt, prompt)
    native(PROMPTS, past_key_values=cache).logits.sum().backward()
    assert prompt.grad is not None
    assert not native_calls


class Scaling:
    """Stands for a LayerFFN."""

    def __init__(self, factors: Tensor) -> None:
        self.factors = factors
        self.rows = 0

    def __call__(self, x: Tensor) -> Tensor:
        return (x.float() * self.factors).to(x.dtype)

    def native(self, rows: int) -> None: ...

    def of_rows(self, rows: Tensor) -> Tensor:
        assert rows.dtype == torch.float32
        self.rows += len(rows)
        return rows * self.factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_streamed_ffn_takes_and_gives_fp32(kind: str, dtype: torch.dtype) -> None:
    parts: Any = make(kind, dtype)[0]
    scaling = Scaling(torch.linspace(-2, 2, 64))
    for layer in parts.model.layers:
        layer.mlp = StreamedFFN()
        layer.mlp.streamed = scaling
    native = copy.deepcopy(parts)
    assert use_native_layers(native, WORKERS, StreamedFFN) == 2
    with torch.no_grad():
        expected = generated(parts, DynamicCache(config=parts.config))
        assert torch.equal(generated(native, GrowingCache(native.config)), expected)
        streamed = native.model.layers[0].mlp.streamed
        assert streamed.rows == 2 * len(expected.flatten(0, 1)), "all rows, in both layers"
        native.model.layers[0].mlp.register_forward_hook(lambda *_: None)
        assert torch.equal(generated(native, GrowingCache(native.config)), expected)


class Halved(nn.Module):
    """A layer with the parts of a native one, which adds half of its attention."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **arguments)
        hidden_states = hidden_states + attended / 2
        made: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return made


class Gated(LlamaDecoderLayer):  # type: ignore[no-untyped-call]
    """Has a weight of its own, which is 1 in this layer."""

    gate: Tensor

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states, *args, **kwargs) * self.gate


def test_another_wiring_is_left_alone() -> None:
    model: Any = make("llama")[0]
    model.model.layers[0] = Halved(model.model.layers[0]).eval()
    model.model.layers[1].gate = nn.Parameter(torch.ones(()), requires_grad=False)
    model.model.layers[1].__class__ = Gated
    assert use_native_layers(model, WORKERS, StreamedFFN) == 0
    assert [type(layer) for layer in model.model.layers] == [Halved, Gated]


@pytest.mark.parametrize("causal", [True, False])
def test_is_causal_of_a_call_is_obeyed(causal: bool) -> None:
    native, parts = models("llama")
    arguments: dict[str, Any] = {"is_causal": causal, "use_cache": False}
    made = native(PROMPTS[:1], **arguments).logits
    assert torch.equal(made, parts(PROMPTS[:1], **arguments).logits)
    assert torch.equal(made, native(PROMPTS[:1], use_cache=False).logits) == causal
