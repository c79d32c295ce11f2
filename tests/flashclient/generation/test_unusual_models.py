"""generate() of models without a cache, and of those whose config has parts or layers of two kinds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from daemon import Daemon, serving
from transformers import AutoConfig, PreTrainedModel

from flashclient import FlashClient
from flashclient.recipes.ffns.tiny import model_class, tiny_model
from weightd import cli

KINDS = {
    "openai-gpt": "no cache",
    "fuyu": "a config of parts",
    "prophetnet": "a config that refuses a number of layers",
}
PROMPT = torch.tensor([[5, 17, 200, 31, 8]])
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    made = {kind: tiny_model(*model_class(AutoConfig.for_model(kind))) for kind in KINDS}
    for model in made.values():
        assert model.generation_config is not None
        model.generation_config.eos_token_id = None
        model.config.use_cache = True
    return made


@pytest.fixture(scope="module")
def daemon(models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("unusual")
    for kind, model in models.items():
        model.save_pretrained(folder / kind)
        assert cli.main(["import", str(folder / kind), "--store", str(folder / "store")]) == 0
    with serving(folder / "store", "--dram", "64MiB") as started:
        yield started


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(kind: str, models: dict[str, Any], daemon: Daemon) -> None:
    with FlashClient(kind, address=daemon.address) as client:
        for beams in (1, 2):
            arguments = GREEDY | {"num_beams": beams}
            assert torch.equal(client.generate(PROMPT, **arguments), models[kind].generate(PROMPT, **arguments))
