"""Look-ahead by router: what is guessed, when it pauses, and that it changes no bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from daemon import serving
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

import flashclient
from flashclient.model.experts.look_ahead import JUDGED_CELLS, PAUSE_STEPS, ROWS_MAX, LookAhead, Trust
from flashclient.model.streamed_experts import StreamedExperts
from flashclient.source.bundle_source import Counters
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store

EXPERTS, PICKS, HIDDEN = 16, 4, 64
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": PICKS,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


class CountingSource:
    """A source that only counts."""

    def __init__(self) -> None:
        self.counted = Counters()

    def counters(self) -> Counters:
        return self.counted

    def read_ahead(self, cells: int, used: int) -> None:
        counted = self.counted
        self.counted = replace(
            counted, prefetched=counted.prefetched + cells, prefetched_used=counted.prefetched_used + used
        )


def olmoe() -> PreTrainedModel:
    return OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=EXPERTS))


def gpt_oss() -> PreTrainedModel:
    return GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=16, num_local_experts=EXPERTS))


@pytest.mark.parametrize("make", [olmoe, gpt_oss])
def test_the_next_router_guesses_from_this_layers_input(make: Any) -> None:
    torch.manual_seed(0)
    model: Any = make().eval().requires_grad_(False)
    source: Any = CountingSource()
    ahead = LookAhead(source, [0, 1, 2])
    inputs: list[Tensor] = []
    for index, layer in enumerate(model.model.layers):
        beside = [module for module in layer.mlp.children() if module is not layer.mlp.experts]
        ahead.watch(index, layer.mlp.experts, beside)
    model(torch.tensor([[5, 7, 9]]))
    for layer in model.model.layers:
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in layer.mlp.modules())
        layer.mlp.experts.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(torch.tensor([[5]]))
    for index in range(2):
        guess = ahead.guess(index, inputs[index])
        assert guess is not None
        layer, experts = guess
        router = getattr(model.model.layers[index + 1].mlp, "gate", None) or model.model.layers[index + 1].mlp.router
        *_, picks = router(inputs[index])
        assert layer == index + 1
        assert experts.tolist() == picks[0].tolist()
    assert ahead.guess(2, inputs[2]) is None, "there is no later mixture"
    assert ahead.guess(0, inputs[0].repeat(ROWS_MAX + 1, 1)) is None, "a prompt picks nearly all"
    assert [ahead.guesses_early(rows) for rows in (ROWS_MAX, ROWS_MAX + 1)] == [True, False]
    two = ahead.guess(0, inputs[0].repeat(2, 1))
    assert two is not None
    assert two[1].tolist() == [expert for expert in ahead.guess(0, inputs[0])[1].tolist() for _ in range(2)]  # type: ignore[index]


def test_a_mixture_whose_router_is_not_found_is_not_guessed() -> None:
    class Experts(nn.Module):
        def forward(self, x: Tensor, picks: Tensor, weights: Tensor) -> Tensor:
            return x

    router, experts = nn.Linear(4, 4), Experts()
    source: Any = CountingSource()
    ahead = LookAhead(source, [0, 1])
    ahead.watch(1, experts, [router])
    x = torch.zeros(1, 4)
    experts(x, router(x).topk(2).indices, x)
    assert ahead.guess(0, x) is None


def test_look_ahead_pauses_where_it_does_not_pay() -> None:
    source: Any = CountingSource()
    trust = Trust(source)
    assert trust.pays(True)
    source.read_ahead(JUDGED_CELLS - 1, 0)
    assert trust.pays(True), "too few to judge"
    source.read_ahead(1, 0)
    for length in (PAUSE_STEPS, 2 * PAUSE_STEPS):
        paused = 0
        while not trust.pays(True):
            paused += 1
        assert paused == length
        source.read_ahead(JUDGED_CELLS, JUDGED_CELLS // 4)
    while not trust.pays(True):
        pass
    source.read_ahead(JUDGED_CELLS, JUDGED_CELLS // 2)
    assert trust.pays(True)
    source.read_ahead(JUDGED_CELLS, 0)
    assert trust.pays(False), "it is judged once for each token"
    assert not trust.pays(True)
    assert not trust.pays(False)
    assert sum(not trust.pays(True) for _ in range(PAUSE_STEPS)) == PAUSE_STEPS - 1, "it has paid in between"


def test_look_ahead_reads_early_and_changes_no_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = olmoe()
    model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "olmoe")
    with Store.open(tmp_path / "store", create=True) as store:
        import_checkpoint(tmp_path / "olmoe", store)
    ids = torch.randint(0, 100, (1, 3), generator=torch.Generator().manual_seed(1))
    arguments: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    with serving(tmp_path / "store", "--cold-start") as daemon:
        with flashclient.FlashClient("olmoe", address=daemon.address) as client:
            looked_ahead = client.generate(ids, **arguments)
            stats = client.stats()
        assert stats.prefetched >= stats.prefetched_used
        assert stats.prefetched > 0
        with flashclient.FlashClient("olmoe", address=daemon.address) as client:
            modules: list[Any] = [one for one in client.model.modules() if isinstance(one, StreamedExperts)]
            modules[0].streamed.ffn.look_ahead._trust.pays = lambda *_: False
            assert torch.equal(client.generate(ids, **arguments), looked_ahead)
            assert client.stats().prefetched == 0
