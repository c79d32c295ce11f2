"""LoRA adapters of FFNs: logits are those of PEFT on transformers' model, and rows without one keep their bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoints import make_config, make_model
from daemon import Daemon, serving
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config, PreTrainedConfig

from flashclient import FlashClient
from flashclient.batching.adapters import Adapters
from weightd import cli

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft's own

COMMON: dict[str, Any] = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 176}
# By name: a configuration, the modules that are adapted, and flags of the import.
CASES: dict[str, tuple[PreTrainedConfig, list[str], list[str]]] = {
    "llama_in_slabs": (make_config("llama", neurons=192), ["gate_proj", "up_proj", "down_proj"], ["--dtype", "int8"]),
    "opt": (make_config("opt"), ["fc1", "fc2"], []),
    "phi3": (Phi3Config(**COMMON, **SMALL), ["gate_up_proj", "down_proj"], []),
    "gpt2": (GPT2Config(**COMMON, n_embd=64, n_layer=2, n_head=4), ["c_fc", "mlp.c_proj"], []),
}
EXACT = [name for name, (_, _, flags) in CASES.items() if not flags]
ROWS, TOKENS = 2, 21  # more rows than a kernel takes at once


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ffn")
    for name, (config, modules, flags) in CASES.items():
        make_model(config).save_pretrained(made / name)
        command = ["import", str(made / name), "--store", str(made / "store"), *flags]
        assert cli.main(command) == 0
        model: Any = AutoModelForCausalLM.from_pretrained(made / name)
        kind: dict[str, Any] = {"target_modules": modules, "init_lora_weights": False, "fan_in_fan_out": name == "gpt2"}
        peft.get_peft_model(model, peft.LoraConfig(r=4, **kind)).save_pretrained(str(made / f"{name}_adapter"))
    return made


@pytest.fixture(scope="module")
def daemon(folder: Path) -> Iterator[Daemon]:
    with serving(folder / "store", "--dram", "64MiB") as started:
        yield started


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("name", list(CASES))
def test_logits_are_those_of_peft(folder: Path, daemon: Daemon, name: str) -> None:
    ids = torch.randint(3, 320, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    with FlashClient(name, address=daemon.address) as client:
        before = logits_of(client.model, ids)
        adapters = Adapters(client.loaded)
        adapters.load("a", folder / f"{name}_adapter")
        adapters.use("a")
        got = logits_of(client.model, ids)
        assert torch.equal(logits_of(client.model, ids[:1, :3]), got[:1, :3]), "rows depend on others"
        assert (got - before).abs().max() > 0.1, "the adapter changes nothing"
        plain: Any = AutoModelForCausalLM.from_pretrained(folder / name)
        expected = logits_of(peft.PeftModel.from_pretrained(plain, str(folder / f"{name}_adapter")).eval(), ids)
        tolerance = 1e-4 if name in EXACT else 0.1
        assert (got - expected).abs().max() < tolerance * expected.abs().max()
        adapters.use(None)
        assert torch.equal(logits_of(client.model, ids), before)
