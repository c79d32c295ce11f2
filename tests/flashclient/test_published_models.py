"""Checkpoints in published formats with remote code, imported as they are and streamed, give their formulas' tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_model
from multimodal_checkpoints import make_whole
from published_checkpoints import (
    BAMBOO,
    CHATGLM,
    LLAMA,
    MINICPM,
    QWEN,
    SPARSE_LLAMA,
    TURBOSPARSE_MIXTRAL,
    State,
    chatglm_state,
    llama,
    qwen_state,
    reference_of,
    state_of,
    turbosparse_mixtral_state,
    write_published,
)
from tiny_configs import DENSE
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from flashclient import FlashClient
from weightd.errors import CheckpointError
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store

NEW_TOKENS = 12
LEARNED = {"xielu": ("alpha_p", "alpha_n", "beta", "eps"), "prelu": ("weight",)}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


def untied() -> State:
    return state_of(llama(tied=False))


CASES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "chatglm": (CHATGLM, chatglm_state, "GlmForCausalLM"),
    "qwen": (QWEN, qwen_state, "Qwen2ForCausalLM"),
    "minicpm": (MINICPM, lambda: state_of(llama(tied=True)), "GraniteForCausalLM"),
    "sparsellama": (SPARSE_LLAMA, untied, "LlamaForCausalLM"),
    "bamboo": (BAMBOO, untied, "MistralForCausalLM"),
    "turbosparsemixtral": (TURBOSPARSE_MIXTRAL, turbosparse_mixtral_state, "MixtralForCausalLM"),
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


@pytest.mark.parametrize("model_type", ["gemma3", "gemma3n", "mistral3", "llama4", "qwen2_vl", "qwen3_vl_moe"])
def test_text_part_streams_the_tokens_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    whole = make_whole(model_type, tmp_path / model_type)
    store = tmp_path / "store"
    with Store.open(store, create=True) as opened:
        import_checkpoint(tmp_path / model_type, opened)
    assert_same(store, model_type, whole)


def test_activation_that_is_named_at_the_import_counts(tmp_path: Path) -> None:
    """SparseQwen2: its configuration says silu, and it computes relu of gate and up."""
    config = LLAMA | {"model_type": "qwen2", "hidden_act": "silu", "tie_word_embeddings": False}
    state = untied()
    state |= {
        f"model.layers.{n}.self_attn.{p}_proj.bias": torch.zeros(32 if p == "q" else 16) for n in (0, 1) for p in "qkv"
    }
    folder = write_published(config, state, tmp_path / "qwen2")
    store = tmp_path / "store"
    with Store.open(store, create=True) as opened:
        record = import_checkpoint(folder, opened, activation="gated_relu")
    assert record.activation.function == "gated_relu"
    assert_same(store, "qwen2", reference_of(config, state, tmp_path / "reference", "gated_relu"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "function"), [("apertus", "xielu"), ("llama", "prelu")])
def test_layers_with_learned_activations_compute_each_their_own(
    kind: str, function: str, dtype: str, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = DENSE | {"hidden_act": function}
    make_model(CONFIG_MAPPING[kind](**sizes), dtype).save_pretrained(tmp_path / kind)
    with Store.open(tmp_path / "store", create=True) as opened:
        record = import_checkpoint(tmp_path / kind, opened, dtype="fp32")
    assert list(record.activation.learned) == [f"act_fn.{name}" for name in LEARNED[function]]
    assert_same(tmp_path / "store", kind, AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "m.M"}},
            "needs code from its publisher, which is ne",
        ),
        (
            CHATGLM | {"rmsnorm": False},
            "rmsnorm = False: model type chatglm runs as GlmForCausalLM, which is right for",
        ),
        (
            CHATGLM | {"multi_query_group_num": 4},
            r"query_key_value\.bias has shape \[64\], but by config\.json it has 96",
        ),
    ],
)
def test_what_no_class_computes_is_refused_in_one_line(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_published(config, chatglm_state(), tmp_path / "m")
    with Store.open(tmp_path / "store", create=True) as store:
        with pytest.raises(CheckpointError, match=message) as caught:
            import_checkpoint(folder, store)
        assert store.names() == []
    assert "\n" not in str(caught.value)


def assert_same(store: Path, name: str, reference: Any) -> None:
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    expected = reference.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    with FlashClient(name, store=store) as client, torch.no_grad():
        torch.testing.assert_close(client.model(IDS).logits, reference(IDS).logits, rtol=1e-3, atol=1e-3)
        assert client.generate(IDS.tolist(), **settings) == expected.tolist()
