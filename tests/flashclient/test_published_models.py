"""Checkpoints in published formats with remote code, imported as they are and streamed, give their formulas' tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from multimodal_checkpoints import make_whole
from published_checkpoints import CHATGLM, QWEN, chatglm_state, qwen_state, reference_of, write_published

from flashclient import FlashClient
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store

NEW_TOKENS = 12
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


CASES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "chatglm": (CHATGLM, chatglm_state, "GlmForCausalLM"),
    "qwen": (QWEN, qwen_state, "Qwen2ForCausalLM"),
}


@pytest.mark.parametrize("case", CASES)
def test_published_format_streams_the_tokens_of_its_reference(case: str, tmp_path: Path) -> None:
    config, make_state, model_class = CASES[case]
    state = make_state()
    store = tmp_path / "store"
    with Store.open(store, create=True) as opened:
        record = import_checkpoint(write_published(config, state, tmp_path / case), opened)
    assert record.model_class == model_class
    assert_same(store, case, reference_of(config, state, tmp_path / "reference"))


@pytest.mark.parametrize("model_type", ["gemma3", "gemma3n", "mistral3", "llama4", "qwen2_vl", "qwen3_vl"])
def test_text_part_streams_the_tokens_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    whole = make_whole(model_type, tmp_path / model_type)
    store = tmp_path / "store"
    with Store.open(store, create=True) as opened:
        import_checkpoint(tmp_path / model_type, opened)
    assert_same(store, model_type, whole)


def assert_same(store: Path, name: str, reference: Any) -> None:
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    expected = reference.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    with FlashClient(name, store=store) as client, torch.no_grad():
        torch.testing.assert_close(client.model(IDS).logits, reference(IDS).logits, rtol=1e-3, atol=1e-3)
        assert client.generate(IDS.tolist(), **settings) == expected.tolist()
