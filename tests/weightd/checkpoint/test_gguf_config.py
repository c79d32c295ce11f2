"""GGUF headers: each key is honoured as by llama.cpp, or refused by name, and nothing is dropped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import make_config, make_model, stored_tensors, write_gguf
from gguf_models import add_value
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from weightd.checkpoint.opening import open_checkpoint
from weightd.errors import CheckpointError
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store

Add = Callable[[gguf.GGUFWriter], Any]
SHAPE: dict[str, Any] = {"layers": 7, "hidden": 64, "neurons": 48}
TOLERANCE = 1e-4


def model_of(family: str, **changes: Any) -> Any:
    return make_model(make_config(family, **(SHAPE | changes)))


def scaling(kind: gguf.RopeScalingType | None, factor: float, **more: Any) -> Add:
    def add(writer: gguf.GGUFWriter) -> None:
        if kind is not None:
            writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(factor)
        for name, value in more.items():
            getattr(writer, f"add_rope_scaling_{name}")(value)

    return add


def change(name: str, value: Any) -> Add:
    """Sets `ARCHITECTURE.name`; or, if `name` ends in a dot, `name` without the dot."""

    def add(writer: gguf.GGUFWriter) -> None:
        key = name[:-1] if name.endswith(".") else f"{writer.arch}.{name}"
        for fields in writer.kv_data:
            fields.pop(key, None)
        add_value(writer, key, value)

    return add


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
BASE = {"rope_theta": 1e6}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}


def frequencies(writer: gguf.GGUFWriter) -> None:
    base = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](make_config("llama", rope_parameters=LLAMA3), "cpu")[0].numpy()
    writer.add_tensor("rope_freqs.weight", (base / scaled).astype("f4"))


def yarn(factor: float = 4.0, **more: Any) -> Add:
    return scaling(gguf.RopeScalingType.YARN, factor, orig_ctx_len=64, **more)


HONOURED: dict[str, tuple[str, dict[str, Any], Add]] = {
    "llama as it is": ("llama", {}, lambda _writer: None),
    "rope_freqs": ("llama", {"rope_parameters": LLAMA3}, frequencies),
    "linear": ("llama", {"rope_parameters": LINEAR}, scaling(gguf.RopeScalingType.LINEAR, 4.0)),
    "a factor without a type": ("llama", {"rope_parameters": LINEAR}, scaling(None, 4.0)),
    "an old key": ("llama", {"rope_parameters": LINEAR}, change("rope.scale_linear", 4.0)),
    "a type without a factor": ("llama", {}, scaling(gguf.RopeScalingType.LINEAR, 1.0)),
    "no type": ("llama", {}, scaling(gguf.RopeScalingType.NONE, 4.0)),
    "yarn": ("qwen2", {"rope_parameters": YARN}, yarn()),
    "yarn's betas": (
        "llama",
        {"rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}},
        yarn(yarn_beta_fast=16.0, yarn_beta_slow=2.0),
    ),
    "yarn's attention": (
        "llama",
        {"rope_parameters": YARN | {"attention_factor": 0.5 * (1 + 0.1 * math.log(4))}},
        yarn(attn_factors=0.5),
    ),
    "base": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, lambda _writer: None),
    "attention biases": ("llama", {"attention_bias": True}, lambda _writer: None),
    "wide heads": (
        "llama",
        {"head_dim": 32},
        lambda w: [change(name, 32)(w) for name in ("attention.key_length", "attention.value_length")]
        + [change("rope.dimension_count", 32)(w)],
    ),
    "a head of its own": ("gemma3", {"tie_word_embeddings": False}, lambda _writer: None),
    "a tied head": ("llama", {"tie_word_embeddings": True}, lambda _writer: None),
    "gemma's scaling is that of full attention": (
        "gemma3",
        {"rope_parameters": {"full_attention": LINEAR | BASE, "sliding_attention": LOCAL}},
        scaling(gguf.RopeScalingType.LINEAR, 4.0),
    ),
    "gemma's local base": (
        "gemma3",
        {"rope_parameters": {"full_attention": LOCAL | BASE, "sliding_attention": LOCAL | {"rope_theta": 99.0}}},
        change("rope.freq_base_swa", 99.0),
    ),
    "gemma's softcap": ("gemma3", {"final_logit_softcapping": 3.0}, change("final_logit_softcapping", 3.0)),
    "gemma's pattern": (
        "gemma3",
        {"layer_types": ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]},
        change("attention.sliding_window_pattern", 2),
    ),
    "gemma's layers": (
        "gemma3",
        {"layer_types": ["full_attention"] * 6 + ["sliding_attention"]},
        change("attention.sliding_window_pattern", [False] * 6 + [True]),
    ),
    "gemma without windows": (
        "gemma3",
        {"layer_types": ["full_attention"] * 7},
        change("attention.sliding_window", None),
    ),
    "gemma's attention scale": ("gemma3", {"query_pre_attn_scalar": 16}, change("attention.scale", 0.25)),
    "neutral keys": (
        "llama",
        {},
        lambda w: [change(name, value)(w) for name, value in (("expert_count", 0), ("attention.causal", True))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HONOURED)
def test_header_is_honoured(tmp_path: Path, case: str) -> None:
    """The configuration with the weights of the model that was written gives its logits."""
    family, changes, add = HONOURED[case]
    written = model_of(family, **changes)
    checkpoint = open_checkpoint(write_gguf(written, tmp_path / "m.gguf", add=add))
    config = AutoConfig.for_model(**checkpoint.config)
    read = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    read.load_state_dict(written.state_dict())
    ids = torch.arange(1, 121).unsqueeze(0)
    with torch.no_grad():
        difference = read.eval()(ids).logits - written(ids).logits
    assert difference.abs().max() < TOLERANCE


@pytest.mark.parametrize("case", ["rope_freqs", "attention biases", "wide heads", "a head of its own"])
def test_weights_go_with_their_header(tmp_path: Path, case: str) -> None:
    """Permuted biases, wide heads and heads of their own are read as they were written."""
    from stored_model import read_state

    family, changes, add = HONOURED[case]
    written = model_of(family, **changes)
    path = write_gguf(written, tmp_path / "m.gguf", add=add)
    with Store.open(tmp_path / "store", create=True) as store:
        import_checkpoint(path, store)
        found = read_state(store, "m")
    expected = stored_tensors(written)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name


REFUSED: list[tuple[str, str, Any, str]] = [
    ("llama", "rope.scaling.type", "longrope", "rope.scaling.type = 'longrope'"),
    ("llama", "rope.dimension_count", 8, "rope.dimension_count = 8, but heads have 16"),
    ("llama", "attention.value_length", 32, "attention.value_length = 32"),
    ("llama", "attention.sliding_window", 16, "attention.sliding_window = 16, and only 0 can be run"),
    ("llama", "final_logit_softcapping", 30.0, r"final_logit_softcapping = 30\.0"),
    ("gemma3", "attn_logit_softcapping", 50.0, r"attn_logit_softcapping = 50\.0, and only 0\.0"),
    ("llama", "expert_count", 8, "lacks llama.expert_used_count"),
    ("llama", "logit_scale", 0.5, r"logit_scale = 0\.5"),
    ("llama", "attention.scale", 0.5, r"attention\.scale = 0\.5"),
    ("llama", "attention.causal", False, "attention.causal = False"),
    ("llama", "a.new.key", 1, r"llama\.a\.new\.key = 1, which weightd does not know"),
    ("llama", "attention.head_count_kv", [2, 1, 2, 2, 2, 2, 2], r"head_count_kv = \[2, 1,"),
    ("llama", "feed_forward_length", 0, "feed_forward_length = 0"),
    ("llama", "embedding_length", "64", "embedding_length = '64'"),
    ("llama", "attention.layer_norm_rms_epsilon", float("nan"), "layer_norm_rms_epsilon = nan"),
    ("llama", "attention.layer_norm_rms_epsilon", None, "lacks llama.attention.layer_norm_rms_epsilon"),
    ("llama", "rope.freq_base", -1.0, r"rope\.freq_base = -1\.0"),
    ("llama", "rope.scaling.yarn_ext_factor", 0.5, r"yarn_ext_factor = 0\.5"),
    ("llama", "vocab_size", 99, "vocab_size = 99, but token_embd.weight has 320 rows"),
    ("gemma3", "attention.sliding_window_pattern", [True, False], "sliding_window_pattern = .* but there are 7 layers"),
    ("llama", "general.type.", "adapter", "general.type = 'adapter'"),
    ("llama", "tokenizer.ggml.model.", "rwkv", "tokenizer.ggml.model = 'rwkv'"),
    ("llama", "tokenizer.ggml.pre.", "no-such", "tokenizer.ggml.pre = 'no-such'"),
    ("llama", "tokenizer.ggml.eos_token_id.", 999, "eos_token_id = 999, but 320 tokens"),
    ("llama", "tokenizer.ggml.eot_token_id.", 999, "eot_token_id = 999, but 320 tokens"),
    ("llama", "tokenizer.ggml.add_sep_token.", True, "tokenizer.ggml.add_sep_token, which weightd does not know"),
    ("llama", "tokenizer.new.", 1, r"tokenizer\.new, which weightd does not know"),
    ("llama", "tokenizer.ggml.eos_token_id.", [2, 3], "eos_token_id = array.*, but 320 tokens"),
    ("llama", "tokenizer.ggml.merges.", ["x"], "cannot convert the tokenizer of .*m.gguf: failed to extract"),
    ("llama", "general.sampling.temp.", "hot", r"general\.sampling\.temp = 'hot', which is not a number"),
    ("llama", "general.sampling.top_k.", [1, 2], r"general\.sampling\.top_k = array.*, which is not a number"),
    ("llama", "block_count", list(range(9999)), r"block_count = .{300,600}\.\.\.\], expected one positive number"),
    ("llama", "general.architecture.", "clip", r"unknown GGUF architecture 'clip': .* are imported from their Hugging"),
    ("llama", "tokenizer.chat_template.tool.", 3, "tokenizer.chat_template.tool = 3"),
]


@pytest.mark.parametrize(
    ("family", "name", "value", "message"), REFUSED, ids=[f"{r[0]} {r[1]} {r[2]}" for r in REFUSED]
)
def test_header_is_refused_by_its_key(tmp_path: Path, family: str, name: str, value: Any, message: str) -> None:
    path = write_gguf(model_of(family), tmp_path / "m.gguf", add=change(name, value))
    assert_refused(tmp_path, path, message)


def assert_refused(tmp_path: Path, path: Path, message: str) -> None:
    with Store.open(tmp_path / "store", create=True) as store:
        with pytest.raises(CheckpointError, match=message) as caught:
            import_checkpoint(path, store)
        assert "\n" not in str(caught.value)
        assert {entry.name for entry in store.path.iterdir()} == {"catalog.mdb", "catalog.mdb-lock"}


def big_endian(content: bytes) -> bytes:
    return content[:4] + content[4:8][::-1] + content[8:]


@pytest.mark.parametrize(
    ("change_bytes", "message"),
    [
        (
            lambda content: content[:4] + b"\1" + content[5:],
            "has GGUF version 1, known are 2 and 3: download a newer",
        ),
        (big_endian, "is big-endian: convert a copy of it with gguf-convert-endian"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, not the file"),
        (lambda _: b"<html>", "is not a GGUF file"),
    ],
)
def test_files_of_another_kind_are_named(change_bytes: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    path = write_gguf(model_of("llama", layers=1), tmp_path / "m.gguf")
    path.write_bytes(change_bytes(path.read_bytes()))
    assert_refused(tmp_path, path, message)


@pytest.mark.parametrize("offset_bytes", [0, 5])
def test_tensors_that_overlap_are_refused(offset_bytes: int, tmp_path: Path) -> None:
    """Else one would be read as the other."""
    path = write_gguf(model_of("llama", layers=1), tmp_path / "m.gguf")
    content, name = path.read_bytes(), b"blk.0.ffn_up.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8 + 4  # after rank, two dimensions and type
    path.write_bytes(content[:place] + offset_bytes.to_bytes(8, "little") + content[place + 8 :])
    assert_refused(tmp_path, path, "is damaged: .* overlaps .*; download it again")


def test_a_vocabulary_alone_is_no_model(tmp_path: Path) -> None:
    path = write_gguf(model_of("llama", layers=1), tmp_path / "m.gguf", add=lambda writer: writer.tensors[0].clear())
    assert_refused(tmp_path, path, "holds no tensors, only a vocabulary: give the file of the model itself")


def test_kinds_of_tokens_that_are_no_list_say_nothing(tmp_path: Path) -> None:
    generation, _ = imported(tmp_path, change("tokenizer.ggml.token_type.", "x"))
    assert generation["eos_token_id"] == 2


TENSORS: dict[str, tuple[str, Any, str]] = {
    "a bias of the FFN": ("blk.0.ffn_up.bias", np.ones(48), r"lacks the tensor .*0\.mlp\.down_proj\.bias"),
    "one bias of four": ("blk.0.attn_q.bias", np.ones(64), r"lacks the tensor .*0\.self_attn\.k_proj\.bias"),
    "a tensor of no kind": ("blk.0.new.weight", np.ones((4, 4)), r"first blk\.0\.new\.weight"),
    "frequencies of another width": ("rope_freqs.weight", np.ones(3), r"rope_freqs\.weight that are not 8 positive"),
    "frequencies below zero": ("rope_freqs.weight", -np.ones(8), r"rope_freqs\.weight that are not 8 positive"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensor_without_a_place_is_refused(tmp_path: Path, case: str) -> None:
    name, values, message = TENSORS[case]
    path = write_gguf(
        model_of("llama"), tmp_path / "m.gguf", add=lambda writer: writer.add_tensor(name, values.astype("f4"))
    )
    assert_refused(tmp_path, path, message)


# The tokenizer and the ends of a generation


def imported(tmp_path: Path, *adds: Add) -> tuple[dict[str, Any], PreTrainedTokenizerBase]:
    """generation_config.json and the tokenizer of an import."""
    path = write_gguf(model_of("llama", layers=1), tmp_path / "m.gguf", add=lambda w: [add(w) for add in adds])
    with Store.open(tmp_path / "store", create=True) as store:
        import_checkpoint(path, store)
        files = store.files_path("m")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(files)
    return json.loads((files / "generation_config.json").read_text()), tokenizer


def test_every_end_token_ends_a_generation(tmp_path: Path) -> None:
    def named(writer: gguf.GGUFWriter) -> None:
        (field,) = [fields["tokenizer.ggml.tokens"] for fields in writer.kv_data if "tokenizer.ggml.tokens" in fields]
        field.value[300] = "<|im_end|>"

    generation, _ = imported(tmp_path, lambda w: w.add_eot_token_id(5), lambda w: w.add_eom_token_id(6), named)
    assert generation == {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": [2, 5, 6, 300]}


def test_sampling_of_the_file_is_the_default(tmp_path: Path) -> None:
    generation, _ = imported(
        tmp_path, change("general.sampling.temp.", 0.5), change("general.sampling.top_k.", 7), lambda _writer: None
    )
    assert generation["do_sample"] is True
    assert (generation["temperature"], generation["top_k"]) == (0.5, 7)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_tokens_around_a_text_are_those_of_the_file(tmp_path: Path, first: bool, last: bool) -> None:
    adds = (change("tokenizer.ggml.add_bos_token.", first), change("tokenizer.ggml.add_eos_token.", last))
    _, tokenizer = imported(tmp_path, *adds)
    ids = tokenizer("hello").input_ids
    assert (ids[0] == 1, ids[-1] == 2) == (first, last)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"


def test_every_chat_template_of_the_file_arrives(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    _, tokenizer = imported(tmp_path, lambda writer: writer.add_chat_template(templates))
    assert tokenizer.chat_template == {"default": "d", "tool_use": "t"}


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "12", ["1", "2"]),
        ("gpt-2", "12", ["12"]),
        ("llama-bpe", "12", ["12"]),
        ("bloom", "12 a.b", ["12", "\u0120a", ".", "b"]),
        ("viking", "12 a.b", ["1", "2", "\u0120a", ".", "b"]),
        ("deepseek-coder", "it's 12\n", ["it", "'", "s", "\u0120", "1", "2", "\u010a"]),
        ("falcon", "it's 12345<=x", ["it", "'", "s", "\u0120", "123", "45", "<=", "x"]),
        ("stablelm2", "It'S 12", ["It", "'S", "\u0120", "1", "2"]),
    ],
)
def test_text_is_split_as_the_file_says(tmp_path: Path, pre: str, text: str, pieces: list[str]) -> None:
    _, tokenizer = imported(tmp_path, change("tokenizer.ggml.pre.", pre))
    backend: Any = tokenizer.backend_tokenizer
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_files_beside_the_gguf_have_no_say(tmp_path: Path) -> None:
    """transformers takes templates and a tokenizer's configuration from there, links to anywhere among them."""
    (tmp_path / "key").write_text("a secret")
    (tmp_path / "chat_template.jinja").symlink_to("key")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "X", "auto_map": {"AutoTokenizer": "x.X"}}')
    _, tokenizer = imported(tmp_path)
    assert tokenizer.chat_template is None


def test_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write_gguf(model_of("llama"), tmp_path / "m.gguf", add=change("general.name.", "tiny"))
    content = path.read_bytes()
    count = int.from_bytes(content[16:24], "little")
    entry = (12).to_bytes(8, "little") + b"general.name" + (8).to_bytes(4, "little") + (1).to_bytes(8, "little") + b"x"
    path.write_bytes(content[:16] + (count + 1).to_bytes(8, "little") + entry + content[24:])
    with pytest.raises(CheckpointError, match=r"has general\.name twice"):
        open_checkpoint(path)


def sentencepiece(writer: gguf.GGUFWriter) -> None:
    for name, value in (("model", "llama"), ("scores", [0.0] * 320), ("pre", None)):
        change(f"tokenizer.ggml.{name}.", value)(writer)


def test_sentencepiece_begins_with_its_token_and_a_space(tmp_path: Path) -> None:
    """llama.cpp's defaults for that kind; here the file does not say."""
    _, tokenizer = imported(tmp_path, sentencepiece, change("tokenizer.ggml.add_bos_token.", None))
    assert tokenizer("a").input_ids[0] == 1
    backend: Any = tokenizer.backend_tokenizer
    assert backend.pre_tokenizer.pre_tokenize_str("a")[0][0] == "\u2581a"


def test_sentencepiece_without_a_space_is_refused(tmp_path: Path) -> None:
    adds = (sentencepiece, change("tokenizer.ggml.add_space_prefix.", False))
    with pytest.raises(CheckpointError, match="add_space_prefix = False, which transformers"):
        imported(tmp_path, *adds)
