"""LoRA adapters that a server switches by request: each answers as PEFT does alone, whatever runs beside it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import peft
import pytest
from checkpoints import make_checkpoint
from daemon import Daemon, serving
from openai_servers import server_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashclient import FlashClient
from flashclient.batching.adapters import Adapters
from flashclient.errors import FlashClientError
from weightd import cli

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft's own

BASE = "tiny"
PROMPT = "Once upon a time"
TOKENS = 12
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FFN = ["gate_proj", "up_proj", "down_proj"]


def make_adapter(checkpoint: Path, folder: Path, modules: list[str], **more: Any) -> Path:
    """An adapter with random weights, which changes what the model says."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = peft.LoraConfig(target_modules=modules, r=4, init_lora_weights=False, **more)
    peft.get_peft_model(model, config).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("adapters")
    checkpoint = make_checkpoint("llama", made / BASE, max_position_embeddings=256)
    assert cli.main(["import", str(checkpoint), "--store", str(made / "store")]) == 0
    make_adapter(checkpoint, made / "one", ["q_proj", "v_proj"], lora_alpha=64)
    make_adapter(checkpoint, made / "other.2", ["k_proj", "o_proj"], lora_alpha=64, lora_dropout=0.5)
    make_adapter(checkpoint, made / "all", [*ATTENTION, *FFN], lora_alpha=16, use_rslora=True)
    make_adapter(checkpoint, made / "ffn", ["down_proj"], lora_alpha=64, layers_to_transform=[1])
    make_adapter(checkpoint, made / "dora", ["up_proj"], use_dora=True)
    make_adapter(make_checkpoint("opt", made / "opt"), made / "stranger", ["out_proj"])
    return made


@pytest.fixture(scope="module")
def daemon(folder: Path) -> Iterator[Daemon]:
    with serving(folder / "store", "--dram", "64MiB") as started:
        yield started


def told_alone(folder: Path, name: str | None) -> str:
    """What transformers and PEFT make of the same prompt."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / BASE)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / BASE)
    if name is not None:
        model = peft.PeftModel.from_pretrained(model, str(folder / name))
    inputs = tokenizer(PROMPT, return_tensors="pt")
    made = model.eval().generate(**inputs, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    text: str = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def test_requests_name_the_adapter(folder: Path, daemon: Daemon) -> None:
    names = {BASE: None, "one": "one", "v2": "other.2", "all": "all", "ffn": "ffn"}
    flags = [f"--lora-modules={name}={folder / adapter}" for name, adapter in names.items() if adapter is not None]
    got: dict[str, set[str]] = {name: set() for name in names}
    with server_of(daemon, BASE, flags=flags) as url, openai.OpenAI(base_url=url, api_key="none") as asking:

        def ask(name: str) -> None:
            for beside in ("", " there was a king who had"):
                prompts = [PROMPT, PROMPT + beside]
                made = asking.completions.create(model=name, prompt=prompts, max_tokens=TOKENS, temperature=0)
                got[name].add(made.choices[0].text)

        with ThreadPoolExecutor() as threads:
            list(threads.map(ask, names))
        listed: list[Any] = list(asking.models.list())
    parents = [(one.id, one.model_dump().get("parent")) for one in listed]
    assert parents == [(BASE, None), *((name, BASE) for name in list(names)[1:])]
    assert got == {name: {told_alone(folder, adapter)} for name, adapter in names.items()}
    assert len(set.union(*got.values())) == len(names), "the adapters change nothing"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("store", "adapter 'a': .*store has no adapter_config.json: give the folder of an adapter of PEFT"),
        (
            "dora",
            "adapter 'a' is of the kind Dora at model.layers.0.mlp.up_proj, and FFNs take plain LoRA: train it so",
        ),
        ("stranger", "adapter 'a' does not fit tiny: "),
        ("torn", "adapter 'a' does not fit tiny: "),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, daemon: Daemon, name: str, message: str) -> None:
    if name == "torn":
        (folder / name).mkdir()
        config = (folder / "one" / "adapter_config.json").read_text()
        (folder / name / "adapter_config.json").write_text(config)
        (folder / name / "adapter_model.safetensors").write_bytes(b"torn")
    with (
        FlashClient(BASE, address=daemon.address) as client,
        pytest.raises(FlashClientError, match=message),
    ):
        Adapters(client.loaded).load("a", folder / name)
