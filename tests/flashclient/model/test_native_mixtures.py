"""A decoder layer with experts is one native call, with the bits of transformers' block around native parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from daemon import serving
from native_calls import attending_layers
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from flashclient import FlashClient
from flashclient.kernels.growing_cache import GrowingCache
from flashclient.model.streamed_experts import RoutedExperts
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store

IDS = torch.arange(3, 31).view(2, 14)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=4,
        vocab_size=100,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    for dtype in ("float32", "bfloat16"):
        model: Any = OlmoeForCausalLM(config)
        model.to(getattr(torch, dtype)).save_pretrained(folder / dtype)
        with Store.open(folder / "store", create=True) as store:
            import_checkpoint(folder / dtype, store)
    with serving(folder / "store") as daemon:
        yield daemon.address


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers whose FFN was called between native parts, one entry a call."""
    return attending_layers(monkeypatch)


def passes(model: Any) -> Tensor:
    """The logits of a prompt, and of some tokens after it."""
    cache = GrowingCache(model.config)
    with torch.no_grad():
        logits = [model(IDS, past_key_values=cache).logits]
        logits += [model(IDS[:, step : step + 1], past_key_values=cache).logits for step in range(5)]
    return torch.cat(logits, 1)


@pytest.mark.parametrize("transport", ["shm", "grpc"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_are_those_of_the_parts(
    address: str, dtype: str, transport: str, parts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[int]] = []  # the layers of each native call
    within = RoutedExperts.within

    def noting(experts: RoutedExperts, layers: Sequence[int], compute: Any) -> None:
        calls.append(list(layers))
        within(experts, layers, compute)

    monkeypatch.setattr(RoutedExperts, "within", noting)
    with FlashClient(dtype, address=address, transport=transport) as client:
        model: Any = client.model
        passes(model)  # in the first, routers are found
        parts.clear()
        calls.clear()
        whole = passes(model)
        assert not parts
        assert calls == [[0], [1], [2], *[[0, 1, 2]] * 5], "the layers of a small step are one call"
        for layer in model.model.layers:
            layer.__dict__["mixture"] = None
        assert torch.equal(passes(model), whole)
        assert len(parts) == 18


def test_hooks_and_collected_logits_need_the_block(address: str, parts: list[Any]) -> None:
    with FlashClient("bfloat16", address=address) as client:
        model: Any = client.model
        expected = passes(model)
        with torch.no_grad():
            logits = model(IDS, output_router_logits=True).router_logits
        assert [one.shape for one in logits] == [(28, 16)] * 3
        parts.clear()
        block = model.model.layers[1].mlp
        for module in (block, block.gate, block.experts):
            seen: list[Any] = []
            handle = module.register_forward_hook(lambda *given, seen=seen: seen.append(given[2]))
            assert torch.equal(passes(model), expected)
            assert len(seen) == 6
            handle.remove()
        assert len(parts) == 18
        assert all(one is model.model.layers[1] for one in parts)
        block.gate.weight.data.mul_(-1)
        changed = passes(model)
        assert not torch.equal(changed, expected)
        block.gate.weight.data.mul_(-1)
        assert torch.equal(passes(model), expected)
