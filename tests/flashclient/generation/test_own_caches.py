"""Models that make a cache of their own kind: generate() leaves it to them, and a server refuses them in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import make_model
from cut_model import clients_of, cut
from tiny_configs import DENSE

from flashclient.batching.scheduler import Scheduler
from flashclient.errors import ModelError


def test_a_model_that_takes_no_cache_of_transformers(tmp_path: Path) -> None:
    kinds = ["linear_attention", "full_attention"]
    kind: Any = transformers.MiniMaxConfig
    config = kind(**DENSE, num_local_experts=4, num_experts_per_tok=2, layer_types=kinds, block_size=4)
    dense: Any = make_model(config)
    dense.generation_config.eos_token_id = None
    ids, plain = torch.arange(3, 12)[None], {"max_new_tokens": 6, "do_sample": False}
    model = cut(dense)
    model.record.bundle.bundles_per_cell = 1
    with clients_of([model], tmp_path) as clients:
        client = clients["tiny"]
        assert client.generate(ids, **plain).tolist() == dense.generate(ids, **plain).tolist()
        with pytest.raises(ModelError, match="MiniMaxForCausalLM has a cache of its own"):
            Scheduler(client.loaded)
