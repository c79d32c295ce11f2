"""Draft models of models whose configuration has parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FuyuConfig, LlamaConfig

from flashclient.errors import ModelError
from flashclient.generation.drafts import Drafts

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_the_vocabulary_is_that_of_the_text_part(tmp_path: Path) -> None:
    with torch.device("meta"):
        text_config = SIZES | {"vocab_size": 32, "model_type": "persimmon"}
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            FuyuConfig(text_config=text_config)
        )
    drafts = Drafts(model, None)
    for vocabulary in (32, 48):
        draft = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            LlamaConfig(**SIZES, vocab_size=vocabulary)
        )
        draft.save_pretrained(tmp_path / str(vocabulary))
    assert drafts.arguments(tmp_path / "32")["assistant_model"].config.vocab_size == 32
    with pytest.raises(ModelError, match="has a vocabulary of 48 tokens, the model of 32"):
        drafts.arguments(tmp_path / "48")
