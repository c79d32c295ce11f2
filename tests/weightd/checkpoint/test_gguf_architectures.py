"""GGUF files of every architecture that is known: what is imported gives the logits and tokens of what was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_models import CASES, make_gguf
from transformers import AutoModelForCausalLM

from flashclient import FlashClient
from weightd.checkpoint.gguf_architectures import ARCHITECTURES, VARIANTS
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store

IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
LONG_IDS = torch.arange(3, 63).unsqueeze(0)  # beyond windows and original contexts
SETTINGS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
TOLERANCE = 1e-3  # of the largest logit


def test_there_is_a_case_for_each_architecture() -> None:
    variants = {variant for _, variant in VARIANTS.values()}
    written = {case.model_type if case.model_type in variants else case.architecture for case in CASES.values()}
    assert written | {"gemma3"} == ARCHITECTURES.keys()  # gemma3: test_gguf_config.py and test_convert.py


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    path, model = make_gguf(CASES[name], tmp_path / "m")
    with Store.open(tmp_path / "store", create=True) as store:
        import_checkpoint(path, store)
    expected = model.generate(IDS, attention_mask=torch.ones_like(IDS), **SETTINGS)  # type: ignore[operator]
    with FlashClient("m", store=tmp_path / "store") as client, torch.no_grad():
        for ids in (IDS, LONG_IDS):
            logits = model(ids).logits
            assert (client.model(ids).logits - logits).abs().max() < TOLERANCE * logits.abs().max()
        assert client.generate(IDS.tolist(), **SETTINGS) == expected.tolist()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.alike])
def test_transformers_reads_the_same(name: str, tmp_path: Path) -> None:
    """Where its own conversion honours the whole header."""
    path, model = make_gguf(CASES[name], tmp_path / "m")
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(read(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
