"""What published() makes of configurations that are not of a remote format, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from flashclient.errors import ModelError
from flashclient.recipes.published import published


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bamboo", "hidden_act": "silu"}, "hidden_act = 'silu': model type bamboo runs as MistralFor"),
        (
            {"model_type": "mine", "auto_map": {"AutoModel": "x.Y"}},
            "'mine' needs code from its publisher, which is never",
        ),
        ({"model_type": "mine"}, "unknown model type 'mine': it may need a newer transformers"),
        ({"model_type": "clip"}, "no causal language model of type 'clip'"),
        (
            {"model_type": "perception_lm", "text_config": {}},
            "'perception_lm' is not known to run alone: it is for gemma3",
        ),
        ({}, "config.json has no model_type"),
        ({"model_type": "chatglm", "position_encoding_2d": True}, "position_encoding_2d = True"),
    ],
)
def test_what_no_class_is_known_to_run_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        published(config)


def test_remote_code_beside_a_class_of_transformers_is_ignored() -> None:
    """As from_pretrained() does with trust_remote_code=False."""
    config = {"model_type": "llama", "hidden_size": 32, "auto_map": {"AutoModelForCausalLM": "x.Y"}}
    assert published(config).config == {"model_type": "llama", "hidden_size": 32}


def test_mistral_with_kinds_of_layers_is_ministral_as_in_transformers() -> None:
    assert published({"model_type": "mistral", "layer_types": ["full_attention"]}).config["model_type"] == "ministral"
