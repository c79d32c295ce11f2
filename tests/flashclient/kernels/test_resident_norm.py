"""Native norms against transformers' and torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from instruction_sets import AVAILABLE
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from flashclient._native import Workers
from flashclient.kernels.dtypes import KERNEL_DTYPES
from flashclient.kernels.resident_norm import NativeNorm, use_native_norms

WORKERS = Workers(2)
NORMS = (LlamaRMSNorm, Gemma3RMSNorm, Olmo2RMSNorm, nn.LayerNorm)


def make(kind: Any, width: int, dtype: torch.dtype, instruction_set: str | None = None) -> tuple[nn.Module, nn.Module]:
    """A native norm with random weights, and the same before it became native."""
    torch.manual_seed(width)
    norm = kind(width)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    plain = copy.deepcopy(norm).to(dtype).requires_grad_(False)
    native = copy.deepcopy(plain)
    assert use_native_norms(native, WORKERS, instruction_set) == 1
    return native, plain


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize("kind", NORMS)
def test_norm_is_what_the_module_computes(kind: Any, instruction_set: str, dtype: torch.dtype) -> None:
    unit = torch.finfo(dtype).eps
    for width in (2, 7, 64, 333, 2048):
        native, plain = make(kind, width, dtype, instruction_set)
        x = (torch.randn(2, 40, width) * torch.logspace(-2, 2, 40)[:, None]).to(dtype)
        y, expected = native(x), plain(x)
        assert (y.dtype, y.shape) == (dtype, x.shape)
        assert torch.allclose(y.double(), expected.double(), rtol=4 * unit, atol=32 * unit)
        for row in (0, 17, 39):
            assert torch.equal(native(x[:1, row]), y[:1, row]), "a row depends on its batch-mates"


def test_module_stays_what_it_was() -> None:
    native, plain = make(LlamaRMSNorm, 64, torch.bfloat16)
    assert isinstance(native, LlamaRMSNorm)
    assert isinstance(native, NativeNorm)
    assert list(native.state_dict()) == list(plain.state_dict())
    assert repr(native) == repr(plain)
    x = torch.randn(3, 64).bfloat16()
    copied = copy.deepcopy(native)
    native.weight = nn.Parameter(native.weight * 2, requires_grad=False)
    assert torch.equal(native(x), plain(x) * 2), "a new weight is not used"
    assert torch.equal(copied(x), plain(x))
    native.weight.mul_(2)
    assert torch.equal(native(x), plain(x) * 4), "a changed weight is not used"
    assert torch.allclose(native(x.float()), plain(x.float()) * 4), "another dtype"
    with_gradient = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    native(with_gradient).sum().backward()
    assert with_gradient.grad is not None


def test_argument_may_be_named() -> None:
    native, plain = make(LlamaRMSNorm, 64, torch.float32)
    x = torch.randn(3, 64)
    assert torch.equal(native(hidden_states=x), native(x))
    assert torch.allclose(native(hidden_states=x), plain(hidden_states=x))


class Scaled(LlamaRMSNorm):
    """Looks like a norm, and computes something else."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * 1.01


@pytest.mark.parametrize("module", [Scaled(64), Qwen3NextRMSNormGated(64), nn.Linear(8, 8), nn.BatchNorm1d(8)])
def test_other_modules_are_left_alone(module: nn.Module) -> None:
    before = type(module)
    assert use_native_norms(module.requires_grad_(False), WORKERS) == 0
    assert type(module) is before
