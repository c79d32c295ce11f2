"""Keys and values in int8: blocks as numpy makes them, attention by the formula over them, and equal bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from instruction_sets import AVAILABLE
from native_models import PROMPTS, WORKERS, make
from numpy.typing import NDArray
from torch import Tensor, nn

from flashclient._native import Attention
from flashclient.kernels.decode_attention import attend
from flashclient.kernels.decoder_layer import use_native_layers
from flashclient.kernels.dtypes import KERNEL_DTYPES
from flashclient.kernels.growing_cache import GrowingCache, Int8WindowLayer, decoded, encoded, row_bytes
from flashclient.model.ffn import StreamedFFN
from weightd_proto.modes import KV_INT8

MASK = (PROMPTS != 0).long()


def blocks_of(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rows [rows, elements] in Q8_0, with zeros up to a whole block."""
    padding = -values.shape[1] % 32
    blocks = np.pad(values, ((0, 0), (0, padding))).reshape(len(values), -1, 32)
    with np.errstate(all="ignore"):
        greatest = np.abs(blocks).max(2)
        scale = (greatest / np.float32(127)).astype(np.float16)
        short = greatest > np.float32(127.5) * scale.astype(np.float32)
        scale = np.where(short, np.nextafter(scale, np.float16(np.inf)), scale)
        scale[~np.isfinite(blocks).all(2) | ~np.isfinite(scale)] = np.nan
        wide = scale.astype(np.float32)
        inverse = np.where((wide == 0) | np.isnan(wide), np.float32(0), np.float32(1) / wide)
        codes = np.rint(np.nan_to_num(blocks, posinf=0, neginf=0) * inverse[..., None]).astype(np.int8)
    stored = np.concatenate([scale[..., None].view(np.uint8).reshape(*scale.shape, 2), codes.view(np.uint8)], 2)
    return stored.reshape(len(values), -1)


def random_rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some channels are much larger than the others, as those of real keys are."""
    large = torch.where(torch.rand(shape[-1]) < 0.1, 20.0, 1.0)
    return (torch.randn(*shape) * large).to(dtype)


@pytest.mark.parametrize("elements", [1, 32, 80, 64])
def test_blocks_are_those_of_numpy(elements: int) -> None:
    torch.manual_seed(elements)
    rows = random_rows(60, elements) * torch.logspace(-44, 40, 60)[:, None]
    rows[:3] = 0.0
    for at, strange in enumerate((np.nan, np.inf, -np.inf, 3e38), 20):
        rows[at, -1] = strange
    made = encoded(rows[None, None])[0, 0]
    assert made.shape == (60, row_bytes(elements))
    expected = blocks_of(rows.numpy())
    codes = np.arange(made.shape[1]) % 34 > 1  # a NaN has many forms
    assert np.array_equal(made.numpy()[:, codes], expected[:, codes])
    back = decoded(made[None, None], rows)[0, 0]
    of_numpy = decoded(torch.from_numpy(expected)[None, None], rows)[0, 0]
    assert torch.equal(back.isnan(), of_numpy.isnan())
    assert torch.equal(back.nan_to_num(), of_numpy.nan_to_num())
    assert back[20:24, -1].isnan().all()
    finite = rows[3:20]
    greatest = torch.nn.functional.pad(finite, (0, -elements % 32)).view(len(finite), -1, 32).abs().amax(2)
    steps = (greatest / 127).clamp(min=2**-24).repeat_interleave(32, 1)[:, :elements]
    assert ((back[3:20] - finite).abs() <= 0.51 * steps).all()


def attention(dtype: torch.dtype, instruction_set: str | None) -> nn.Module:
    module: Any = nn.Module()
    module.is_causal = True
    module.decode_kernels = {dtype: Attention(WORKERS, KERNEL_DTYPES[dtype], instruction_set)}
    return module  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize("elements", [64, 80, 128, 32, 7])
def test_attention_is_the_formula_over_what_is_held(dtype: torch.dtype, instruction_set: str, elements: int) -> None:
    torch.manual_seed(0)
    module, keys = attention(dtype, instruction_set), 150
    key, value = (encoded(random_rows(2, 3, keys + 9, elements))[:, :, :keys] for _ in range(2))  # with room behind
    for tokens in (1, 7):
        query = torch.randn(2, 6, tokens, elements).to(dtype)
        mask = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens).expand(2, 1, tokens, keys).clone()
        mask[1, :, :, :11] = False
        out, _ = attend(module, query, key, value, mask)
        wide = [decoded(one, query.double()).repeat_interleave(2, 1) for one in (key, value)]
        scores = (query.double() @ wide[0].mT * elements**-0.5).masked_fill(~mask, -torch.inf)
        expected = (scores.softmax(-1) @ wide[1]).transpose(1, 2)
        unit = torch.finfo(dtype).eps
        scale = wide[1].abs().max()
        assert torch.allclose(out.double(), expected, rtol=unit, atol=float(scale) * max(unit / 4, 2e-4))
        for row in range(tokens):  # alone, in memory of its own, without what it does not attend to
            held = keys - tokens + row + 1
            alone, _ = attend(
                module,
                query[1:, :, row : row + 1].clone(),
                key[1:, :, 11:held].clone(),
                value[1:, :, 11:held].clone(),
                None,
            )
            assert torch.equal(alone[0, 0], out[1, row])


def generated(model: Any, cache: Any, prompt: tuple[int, ...] = (99,)) -> Tensor:
    """The logits of a prompt with padding, in passes of so many tokens, then of passes of one and of three."""
    logits, done = [], 0
    for size in (*prompt, 99):
        some = PROMPTS[:, done : done + size]
        if some.shape[1]:
            done += some.shape[1]
            logits.append(model(some, attention_mask=MASK[:, :done], past_key_values=cache, use_cache=True).logits)
    mask = MASK
    for step in range(9):
        tokens = torch.full((2, 3 if step % 4 == 3 else 1), 30 + step)
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        logits.append(model(tokens, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_native_layers_their_parts_and_any_passes_give_the_same_bits(kind: str) -> None:
    parts: Any = make(kind, torch.bfloat16)[0]
    expected = generated(parts, GrowingCache(parts.config, KV_INT8))
    plain = generated(parts, GrowingCache(parts.config))
    assert not torch.equal(expected, plain)
    assert torch.allclose(expected, plain, atol=0.05)
    assert torch.equal(generated(parts, GrowingCache(parts.config, KV_INT8), (1, 2)), expected)
    assert use_native_layers(parts, WORKERS, StreamedFFN) == 2
    for prompt in ((99,), (2, 1)):
        cache: Any = GrowingCache(parts.config, KV_INT8)
        assert torch.equal(generated(parts, cache, prompt), expected)
    assert cache.layers[0].keys.dtype == torch.uint8
    assert isinstance(cache.layers[0], Int8WindowLayer) == (kind == "gemma3_text")


def test_a_call_that_is_not_native_computes_on_decoded_values() -> None:
    parts: Any = make("llama", torch.float32)[0]
    expected = generated(parts, GrowingCache(parts.config, KV_INT8))
    parts.set_attn_implementation("eager")
    made = generated(parts, GrowingCache(parts.config, KV_INT8))
    assert torch.allclose(made[:, -11:], expected[:, -11:], atol=1e-3)  # padding attends to something else there
