"""Values of config.json, as transformers reads and writes them."""

from __future__ import annotations

import json
import math

import pytest
from transformers import BambaConfig

from flashclient.errors import ModelError
from flashclient.recipes.configs import read_config


def test_infinity_is_read_as_transformers_writes_it() -> None:
    values = json.loads(BambaConfig().to_json_string(use_diff=False))
    assert values["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert read_config(values).time_step_limit[1] == math.inf


def test_a_value_that_its_class_refuses_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"^config\.json: [^\n]*hidden_size[^\n]*$"):
        read_config({"model_type": "llama", "hidden_size": "wide"})
