"""Conv1D against its formula in float64, and rows that do not depend on others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config
from transformers.pytorch_utils import Conv1D

from flashclient.kernels.resident_conv1d import ROWS_TOGETHER, ResidentConv1D, use_resident_conv1ds


def made(inputs: int, outputs: int, dtype: torch.dtype) -> Any:
    layer: Any = Conv1D(outputs, inputs)  # type: ignore[no-untyped-call]
    torch.nn.init.normal_(layer.weight, std=inputs**-0.5)
    torch.nn.init.normal_(layer.bias)
    assert use_resident_conv1ds(layer) == 1
    return layer.to(dtype).requires_grad_(False)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(ROWS_TOGETHER)), st.integers(1, 900), st.integers(1, 300), st.integers(1, 50))
def test_product_is_the_formula(dtype: torch.dtype, inputs: int, outputs: int, rows: int) -> None:
    torch.manual_seed(rows)
    layer = made(inputs, outputs, dtype)
    x = torch.randn(rows, inputs).to(dtype)
    y = layer(x)
    unit = torch.finfo(dtype).eps
    expected = x.double() @ layer.weight.double() + layer.bias.double()
    assert y.dtype == dtype
    assert torch.allclose(y.double(), expected, rtol=unit, atol=max(2 * unit, 1e-5))
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(layer(x[row : row + 1])[0], y[row]), "a row depends on others"
        assert torch.equal(layer(x[row:]), y[row:]), "a row depends on its place"


@pytest.mark.parametrize("dtype", ROWS_TOGETHER)
def test_rows_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    layer, before = made(768, 2304, dtype), torch.get_num_threads()
    x = torch.randn(11, 768).to(dtype)
    try:
        torch.set_num_threads(1)
        alone = layer(x)
        torch.set_num_threads(4)
        assert torch.equal(layer(x), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ROWS_TOGETHER)
def test_rows_of_real_sizes_do_not_depend_on_others(dtype: torch.dtype) -> None:
    for inputs, outputs in ((768, 2304), (1280, 1280)):
        layer = made(inputs, outputs, dtype)
        x = torch.randn(2, 20, inputs).to(dtype)
        y = layer(x)
        assert torch.equal(layer(x[:1, :3]), y[:1, :3])
        assert torch.equal(layer(x[1, 7:8]), y[1, 7:8])


def test_gradients_are_of_torch() -> None:
    layer = made(8, 4, torch.float32)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.weight.sum(dim=1).expand(3, 8))


def test_layers_of_a_model_are_found() -> None:
    model: Any = make_model(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2))
    assert use_resident_conv1ds(model) == 8
    assert isinstance(model.transformer.h[0].attn.c_attn, ResidentConv1D)
    assert use_resident_conv1ds(model) == 0
