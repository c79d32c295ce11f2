"""Native attention: against the formula in float64, with equal bits whatever surrounds a row, and in whole models."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, make_config, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import AVAILABLE
from torch import Tensor, nn

from flashclient._native import Attention, Workers
from flashclient.kernels.decode_attention import IMPLEMENTATION, attend, use_decode_attention
from flashclient.kernels.dtypes import KERNEL_DTYPES
from flashclient.kernels.growing_cache import GrowingCache
from flashclient.torch_state import one_thread

WORKERS = Workers(2)
PROMPT = [5, 17, 200, 31, 8]
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}


sets = st.sampled_from(AVAILABLE)
dtypes = st.sampled_from(sorted(KERNEL_DTYPES, key=str))


def attention_module(dtype: torch.dtype, instruction_set: str | None = None, threads: int = 2) -> nn.Module:
    module: Any = nn.Module()
    module.is_causal = True
    workers = WORKERS if threads == 2 else Workers(threads)
    module.decode_kernels = {dtype: Attention(workers, KERNEL_DTYPES[dtype], instruction_set)}
    return module  # type: ignore[no-any-return]


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[sequences, tokens, heads, elements] in float64; 0 where a row attends to nothing."""
    group = query.shape[1] // key.shape[1]
    keys, values = (tensor.double().repeat_interleave(group, 1) for tensor in (key, value))
    scores = query.double() @ keys.transpose(2, 3) * scale
    if mask is not None:
        additive = mask.double() if mask.is_floating_point() else torch.where(mask, 0.0, -torch.inf)
        scores = scores + additive
    return (scores.softmax(-1).nan_to_num(0) @ values).transpose(1, 2)


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same values in another layout: contiguous, with spare room, or with heads side by side."""
    if how == "spare":
        room = torch.full((*tensor.shape[:2], tensor.shape[2] + 5, tensor.shape[3]), torch.nan, dtype=tensor.dtype)
        room[:, :, : tensor.shape[2]] = tensor
        return room[:, :, : tensor.shape[2]]
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if how == "heads side by side" else tensor


def make_mask(kind: str, sequences: int, heads: int, tokens: int, key_count: int, dtype: torch.dtype) -> Tensor | None:
    if kind == "none":
        return None
    causal = torch.ones(tokens, key_count, dtype=torch.bool).tril(key_count - tokens)
    if kind == "padded":
        return causal & (torch.arange(key_count) >= torch.arange(sequences)[:, None, None, None])
    scattered = torch.rand(sequences, heads, tokens, key_count) < 0.7
    if kind == "scattered":
        return scattered
    bias = torch.randn(1, 1, tokens, key_count).to(dtype)
    return bias.masked_fill(~causal, torch.finfo(dtype).min)


@settings(max_examples=250, deadline=None)
@given(
    dtypes,
    sets,
    st.integers(1, 3),
    st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1), (20, 1)]),
    st.integers(1, 40),
    st.integers(0, 300),
    st.tuples(st.integers(1, 80), st.integers(1, 80)),
    st.sampled_from(["none", "padded", "scattered", "additive"]),
    st.sampled_from(["plain", "spare", "heads side by side"]),
    st.sampled_from([None, 1.0, 0.3]),
    st.integers(0, 1000),
)
def test_attention_is_the_formula(
    dtype: torch.dtype,
    instruction_set: str,
    sequences: int,
    heads: tuple[int, int],
    tokens: int,
    past: int,
    elements: tuple[int, int],
    kind: str,
    layout: str,
    scaling: float | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    key_count = past + tokens
    query = strided(torch.randn(sequences, heads[0], tokens, elements[0]).to(dtype), layout)
    key = strided(torch.randn(sequences, heads[1], key_count, elements[0]).to(dtype), layout)
    value = strided(torch.randn(sequences, heads[1], key_count, elements[1]).to(dtype), layout)
    mask = make_mask(kind, sequences, heads[0], tokens, key_count, dtype)
    module = attention_module(dtype, instruction_set)
    out, weights = attend(module, query, key, value, mask, scaling=scaling, is_causal=False)
    assert weights is None
    assert out.dtype == dtype
    scale = elements[0] ** -0.5 if scaling is None else scaling
    lowest = None if mask is None or kind != "additive" else mask <= torch.finfo(dtype).min
    meant = mask if mask is None or lowest is None else mask.double().masked_fill(lowest, -torch.inf)
    expected = formula(query, key, value, meant, scale)
    unit = torch.finfo(dtype).eps
    assert torch.allclose(out.double(), expected, rtol=unit, atol=max(unit / 4, 2e-5))


@pytest.fixture(params=AVAILABLE)
def instruction_set(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_a_row_depends_on_what_it_attends_to_alone(dtype: torch.dtype, instruction_set: str) -> None:
    """It does not depend on other rows, the contents of padding, the form of the mask, or threads."""
    torch.manual_seed(0)
    heads, key_count, tokens, padding = 4, 133, 7, 9
    query = torch.randn(2, heads, tokens, 40).to(dtype)
    key, value = (torch.randn(2, 2, key_count, 40).to(dtype) for _ in range(2))
    causal = torch.ones(tokens, key_count, dtype=torch.bool).tril(key_count - tokens)[None, None]
    module = attention_module(dtype, instruction_set)
    together, _ = attend(module, query, key, value, causal.expand(2, 1, -1, -1))
    additive = torch.zeros_like(causal, dtype=dtype).masked_fill(~causal, torch.finfo(dtype).min)
    assert torch.equal(attend(module, query, key, value, additive)[0], together)
    for threads in (1, 5):
        other = attention_module(dtype, instruction_set, threads)
        assert torch.equal(attend(other, query, key, value, causal)[0], together)
    for sequence in range(2):
        for token in range(tokens):
            seen = key_count - tokens + 1 + token
            one = query[sequence, :, token][None, :, None]
            keys, values = (tensor[sequence : sequence + 1, :, :seen] for tensor in (key, value))
            assert torch.equal(attend(module, one, keys, values, None)[0][0, 0], together[sequence, token])
            padded = (torch.cat([torch.full_like(t[:, :, :padding], torch.nan), t], 2) for t in (keys, values))
            padded_keys, padded_values = padded
            mask = (torch.arange(padding + seen) >= padding)[None, None, None]
            assert torch.equal(
                attend(module, one, padded_keys, padded_values, mask)[0][0, 0], together[sequence, token]
            )


def test_masked_values_that_are_not_finite_add_nothing() -> None:
    """One token of a call attends to a key and another one does not."""
    module = attention_module(torch.float32)
    query, key, value = (torch.randn(1, 1, count, 8) for count in (2, 5, 5))
    mask = torch.tensor([[True] * 4 + [False], [True] * 5])[None, None]
    clean, _ = attend(module, query, key, value, mask)
    key[0, 0, 4], value[0, 0, 4] = torch.inf, torch.nan
    spoilt, _ = attend(module, query, key, value, mask)
    assert torch.equal(spoilt[0, 0], clean[0, 0])
    assert spoilt[0, 1].isnan().all()


def test_large_and_small_scores(instruction_set: str) -> None:
    module = attention_module(torch.float32, instruction_set)
    query, value = torch.ones(1, 1, 1, 1), torch.arange(4.0).view(1, 1, 4, 1)
    for scores in ([1e30, 0, -1e30, 1e30], [-1e4, -1e4, -1e4, -1e4], [0, -80, -87, -100], [3e38, -3e38, 0, 0]):
        key = torch.tensor(scores, dtype=torch.float32).view(1, 1, 4, 1)
        out, _ = attend(module, query, key, value, None, scaling=1.0)
        assert torch.allclose(out.double(), formula(query, key, value, None, 1.0), rtol=1e-6, atol=1e-37)
    key = torch.tensor([0, -torch.inf, torch.nan, 1]).view(1, 1, 4, 1)
    assert attend(module, query, key, value, None, scaling=1.0)[0].isnan().all()


@pytest.mark.parametrize("tokens", [1, 5, 16, 50])
def test_causal_without_a_mask_is_as_sdpa_has_it(tokens: int) -> None:
    module: Any = attention_module(torch.float32)
    query, key, value = (torch.randn(2, 3, count, 16) for count in (tokens, tokens + 4, tokens + 4))
    plain: Any = nn.Module()
    plain.is_causal = True
    for causal in (None, True, False):
        out, _ = attend(module, query, key, value, None, is_causal=causal)
        assert torch.allclose(out, attend(plain, query, key, value, None, is_causal=causal)[0], atol=1e-5)


def test_transformers_takes_what_the_kernel_does_not() -> None:
    module, plain = attention_module(torch.float32), nn.Module()

    def same(query: Tensor, key: Tensor, mask: Tensor | None = None, **arguments: Any) -> bool:
        results = []
        for each in (module, plain):
            torch.manual_seed(1)
            results.append(attend(each, query, key, key, mask, **arguments)[0])
        return torch.equal(*results)

    query, key = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 30, 16)
    assert same(query, key, dropout=0.5)
    assert same(query.double(), key.double())
    assert same(query, key.transpose(2, 3).contiguous().transpose(2, 3))
    assert same(query, key, torch.ones(4, 30, dtype=torch.bool))
    assert same(query, key, position_bias=torch.randn(1, 2, 4, 30))
    assert not same(query, key, torch.ones(1, 1, 4, 30, dtype=torch.bool))
    with pytest.raises(ValueError, match="softcap"):
        attend(module, query, key, key, None, softcap=30.0)
    leaf = query.clone().requires_grad_(True)
    attend(module, leaf, key, key, None)[0].sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None


def made(family: str, **changes: Any) -> tuple[Any, Any]:
    """transformers' model, and the same with native attention."""
    plain: Any = make_model(make_config(family, **changes)).requires_grad_(False)
    native = copy.deepcopy(plain)
    assert use_decode_attention(native, WORKERS, AVAILABLE[0]) == plain.config.num_hidden_layers
    assert (plain.config._attn_implementation, native.config._attn_implementation) == ("sdpa", IMPLEMENTATION)
    return plain, native


def padded_prompts() -> dict[str, Tensor]:
    mask = torch.tensor([[0] * 12 + [1] * 5, [1] * 17, [0] * 16 + [1]])
    ids = torch.randint(3, 300, (3, 17), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids * mask, "attention_mask": mask}


@one_thread()
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_that_of_transformers(family: str) -> None:
    """Greedy, in a batch with padding, beams, several answers, drafts from prompt and model, without a cache."""
    plain, native = made(family)
    one = {"input_ids": torch.tensor([PROMPT])}
    cases: list[dict[str, Any]] = [
        one,
        padded_prompts(),
        {**padded_prompts(), "num_beams": 3},
        {**one, "num_beams": 4, "num_return_sequences": 3},
        {"input_ids": torch.tensor([PROMPT * 6]), "prompt_lookup_num_tokens": 6},
        {**one, "use_cache": False, "max_new_tokens": 4},
        {**one, "assistant_model": make_model(make_config(family), seed=1)},
        {**one, "assistant_model": plain},
    ]
    for case in cases:
        arguments = GREEDY | case
        expected = plain.generate(**arguments)
        cached = {} if "use_cache" in case else {"past_key_values": GrowingCache(native.config)}
        for extra in ({}, cached):
            assert torch.equal(native.generate(**arguments, **extra), expected), case


@one_thread()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str) -> None:
    plain, native = made(family)
    caches: list[Any] = [None, None]
    for columns in (5, 1, 16, 3, 20, 1):  # across the sliding window of 16
        ids = torch.randint(3, 300, (2, columns), generator=torch.Generator().manual_seed(columns))
        outs = [m(ids, past_key_values=cache, use_cache=True) for m, cache in zip((plain, native), caches, strict=True)]
        caches = [out.past_key_values for out in outs]
        assert torch.allclose(outs[0].logits, outs[1].logits, atol=1e-4)


def test_what_a_user_chose_stays() -> None:
    for chosen in ("eager", "flex_attention"):
        model: Any = make_model(make_config("llama"))
        model.set_attn_implementation(chosen)
        assert use_decode_attention(model, WORKERS, AVAILABLE[0]) == 0
        assert model.config._attn_implementation == chosen
    _, native = made("llama")
    native.set_attn_implementation("eager")
    out = native(torch.tensor([PROMPT]), output_attentions=True)
    assert len(out.attentions) == native.config.num_hidden_layers
    another: Any = type(native)(native.config)  # of the same config, without kernels
    another.set_attn_implementation(IMPLEMENTATION)
    assert another(torch.tensor([PROMPT])).logits.isfinite().all()


def test_default_is_the_best_instruction_set() -> None:
    model: Any = make_model(make_config("opt"))
    assert use_decode_attention(model, WORKERS) == model.config.num_hidden_layers
    kernels = model.model.decoder.layers[0].self_attn.decode_kernels
    assert kernels[torch.bfloat16].instruction_set == Attention(WORKERS, "BF16", AVAILABLE[0]).instruction_set
    with pytest.raises(ValueError, match="instruction set 'mmx' is unknown"):
        use_decode_attention(model, WORKERS, "mmx")


def test_shapes_that_do_not_fit_are_refused() -> None:
    kernel, one = Attention(WORKERS, "F32"), np.zeros((1, 2, 1, 8), np.float32)
    with pytest.raises(ValueError, match="multiple of key heads"):
        kernel.attend(one[:, :1].repeat(3, 1), one, one, None, False, 1.0, np.zeros((1, 1, 3, 8), np.float32))
    with pytest.raises(ValueError, match="must be contiguous"):
        kernel.attend(one, one.repeat(2, 3)[..., ::2], one, None, False, 1.0, np.zeros((1, 1, 2, 8), np.float32))
