"""A client can run every model that an import accepts: each config value works as in transformers or is refused."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint, make_tokenizer
from cut_model import ArraySource, cut
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from flashclient._native import Workers
from flashclient.model.build import build_model
from weightd.errors import CheckpointError
from weightd.importing import client_process
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store

FAMILIES = ("gemma3", "llama", "opt", "qwen2")
SHAPE = {"layers": 1, "hidden": 32, "neurons": 48}
LOGITS_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {family: make_checkpoint(family, folder / family, **SHAPE) for family in FAMILIES}  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", create=True)


def changed(original: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(original, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
HONOURED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"quantization_config": None}),
    ("llama", {"architectures": None}),
    ("llama", {"architectures": ["MistralForCausalLM"]}),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}),
    ("llama", {"hidden_act": "swish"}),
    ("llama", {"hidden_act": "gelu_new"}),
    ("llama", {"hidden_act": "gelu_fast"}),
    ("llama", {"hidden_act": "gelu_python"}),
    ("llama", {"hidden_act": "relu2"}),
    ("llama", {"hidden_act": "relu6"}),
    ("llama", {"hidden_act": "quick_gelu"}),
    *(("llama", {"hidden_act": name}) for name in ("gelu_10", "hardswish", "laplace", "leaky_relu", "linear", "mish")),
    *(("llama", {"hidden_act": name}) for name in ("sigmoid", "sqrtsoftplus", "tanh")),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("llama", {"rope_parameters": ROPE}),
    ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic"}}),
    ("llama", {"an_unknown_key": 3, "pretraining_tp": 2}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "layer_types": None}),
    ("gemma3", {"hidden_activation": "gelu_new", "hidden_act": "relu"}),
    ("gemma3", {"hidden_activation": "mish"}),
    ("gemma3", {"final_logit_softcapping": 3.0}),
    ("gemma3", {"query_pre_attn_scalar": 7}),
    ("opt", {"activation_function": "gelu_10"}),
    ("opt", {"activation_function": "hardswish"}),
    ("opt", {"do_layer_norm_before": False}),
    ("opt", {"layerdrop": 0.5, "dropout": 0.5}),
]


@pytest.mark.parametrize(("family", "changes"), HONOURED, ids=[f"{family} {changes}" for family, changes in HONOURED])
def test_value_is_honoured_as_by_transformers(
    originals: dict[str, Path], tmp_path: Path, store: Store, family: str, changes: dict[str, Any]
) -> None:
    folder = changed(originals[family], tmp_path / "m", **changes)
    if family == "opt" and "do_layer_norm_before" in changes:
        _drop(folder, "model.decoder.final_layer_norm.")
    dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    record = import_checkpoint(folder, store)
    parts = cut(dense)
    files = store.files_path(record.name)
    placements = parts.placements.__getitem__
    streamed: Any = build_model(parts.record, files, ArraySource(parts, [61]), placements, Workers(1)).model
    ids = torch.arange(3, 27).unsqueeze(0)
    with torch.no_grad():
        difference = streamed(ids).logits - dense(ids).logits
    assert difference.abs().max() < LOGITS_TOLERANCE


def _drop(folder: Path, prefix: str) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


NAN = float("nan")
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *(
        ("llama", {"hidden_size": size}, r"hidden_size(' expected| = )")
        for size in ("64", None, -1, 0, NAN, 1e999, [32], True, 2e9)
    ),
    ("llama", {"hidden_size": 64}, r"has shape \[\d+, 32\] in"),
    ("llama", {"num_attention_heads": 3}, "."),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads = 0"),
    ("llama", {"num_key_value_heads": 3}, "."),
    ("llama", {"head_dim": "8"}, "'head_dim' with value '8'"),
    ("llama", {"vocab_size": None}, "'vocab_size' expected int"),
    ("llama", {"mlp_bias": True}, r"lacks the tensor model\.layers\.0\.mlp\.down_proj\.bias"),
    ("llama", {"tie_word_embeddings": None}, "'tie_word_embeddings' expected bool, got NoneType"),
    ("llama", {"mlp_bias": "false"}, "'mlp_bias' expected bool, got str"),
    ("llama", {"attention_bias": True}, r"lacks the tensor .*k_proj\.bias"),
    ("qwen2", {"model_type": "llama"}, r"no place for, first .*\.bias"),
    ("gemma3", {"model_type": "llama"}, r"no place for, first .*norm"),
    ("llama", {"num_hidden_layers": 2}, r"lacks the tensor model\.layers\.1"),
    ("llama", {"tie_word_embeddings": 1}, "'tie_word_embeddings' expected bool, got int"),
    *(
        ("llama", {"hidden_act": name}, "config.json: |no FFN of LlamaForCausalLM")
        for name in ("?", None, 3)
    ),
    ("llama", {"hidden_act": "prelu"}, r"lacks the tensor model\.layers\.0\.mlp\.act_fn\.weight"),
    ("llama", {"rms_norm_eps": "1e-6"}, "config.json: "),
    ("llama", {"rms_norm_eps": None}, "config.json: "),
    ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "config.json: "),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "config.json: "),
    ("llama", {"rope_parameters": ROPE | {"factor": "4"}}, "config.json: "),
    ("llama", {"torch_dtype": "float33", "dtype": None}, "config.json: "),
    ("llama", {"attn_implementation": "flash_attention_2"}, "config.json: "),
    ("llama", {"max_position_embeddings": None}, "config.json: "),
    ("llama", {"model_type": "gemma3", "text_config": {}}, r"has shape \[320, 32\] in"),
    ("llama", {"model_type": None}, "config.json has no model_type"),
    ("llama", {"model_type": "mine", "auto_map": {"AutoConfig": "c.C"}}, "'mine' needs code from its publisher"),
    ("llama", {"model_type": ["llama"]}, "config.json has no model_type"),
    ("llama", {"configuration_files": ["config.4.0.0.json"]}, r"config\.4\.0\.0\.json cannot be read: no such file"),
    ("llama", {"configuration_files": ["config.new.json"]}, r"names config\.new\.json, which is of no version"),
    *(
        ("llama", {"quantization_config": {"quant_method": method}}, rf"is quantised \({method}\)")
        for method in ("quanto", "hqq", "aqlm")
    ),
    ("llama", {"quantization_config": {}}, r"is quantised \(quantization_config = {}\)"),
    ("llama", {"compression_config": {"format": "x"}}, r"is quantised \(compression_config = "),
    ("qwen2", {"layer_types": ["spiral_attention"]}, "config.json: "),
    ("qwen2", {"layer_types": ["full_attention"] * 3}, "config.json: "),
    ("opt", {"max_position_embeddings": 100}, r"has shape \[258, 32\]"),
    ("opt", {"word_embed_proj_dim": 16}, r"has shape .* says \[320, 16\]|lacks the tensor"),
    ("opt", {"_remove_final_layer_norm": True}, r"no place for, first model\.decoder\.final_layer_norm"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes", "message"), REFUSED, ids=[f"{family} {changes}" for family, changes, _ in REFUSED]
)
def test_value_is_refused_by_name(
    originals: dict[str, Path], tmp_path: Path, store: Store, family: str, changes: dict[str, Any], message: str
) -> None:
    folder = changed(originals[family], tmp_path / "m", **changes)
    assert_refused(folder, store, message)


def assert_refused(folder: Path, store: Store, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        import_checkpoint(folder, store)
    assert "\n" not in str(caught.value)
    assert {path.name for path in store.path.iterdir()} == {"catalog.mdb", "catalog.mdb-lock"}


# The other files

FILES: dict[str, tuple[str, str, str]] = {
    "a list": ("generation_config.json", "[]", "/m: generation_config.json: "),
    "half a file": ("generation_config.json", '{"max_len', r"/m: generation_config.json: [^/]*$"),
    "no temperature": ("generation_config.json", '{"do_sample": true, "temperature": 0.0}', "generation_config.json: "),
    "an end that is text": ("generation_config.json", '{"eos_token_id": "</s>"}', "generation_config.json: "),
    "half a tokenizer": ("tokenizer.json", '{"version": "1.0", "mod', "tokenizer files: "),
}


@pytest.mark.parametrize("case", FILES)
def test_file_that_no_client_can_read_is_refused_by_name(
    originals: dict[str, Path], tmp_path: Path, store: Store, case: str
) -> None:
    name, content, message = FILES[case]
    folder = changed(originals["llama"], tmp_path / "m")
    (folder / name).write_text(content)
    assert_refused(folder, store, message)


@pytest.mark.parametrize(
    "content", ['{"max_length": 40}', "{}", '{"num_beams": 2, "eos_token_id": [2, 5]}', '{"unknown": null}']
)
def test_generation_config_that_transformers_takes_is_taken(
    originals: dict[str, Path], tmp_path: Path, store: Store, content: str
) -> None:
    folder = changed(originals["llama"], tmp_path / "m")
    (folder / "generation_config.json").write_text(content)
    import_checkpoint(folder, store)


def test_every_chat_template_arrives(originals: dict[str, Path], tmp_path: Path, store: Store) -> None:
    from transformers import AutoTokenizer

    folder = changed(originals["llama"], tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(name)
    import_checkpoint(folder, store)
    templates = AutoTokenizer.from_pretrained(store.files_path("m")).chat_template
    assert templates == {"default": "{{ messages }}", "tool_use": "tool_use", "rag": "rag"}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    shutil.rmtree(folder / "additional_chat_templates")
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    import_checkpoint(folder, store, "listed")
    assert AutoTokenizer.from_pretrained(store.files_path("listed")).chat_template == {"default": "d", "tool_use": "t"}


@pytest.mark.parametrize(
    ("name", "loads"), [("X", False), ("PreTrainedTokenizerFast", True), ("GPT2TokenizerFast", True)]
)
def test_tokenizer_that_needs_code_of_its_own_is_left_alone(
    originals: dict[str, Path], tmp_path: Path, store: Store, name: str, loads: bool
) -> None:
    """With the class of another tokenizer its files would give other ids."""
    from flashclient.model.loaded import load_tokenizer

    folder = changed(originals["llama"], tmp_path / "m")
    config = {"tokenizer_class": name, "auto_map": {"AutoTokenizer": ["x.X", None]}}
    make_tokenizer().save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    import_checkpoint(folder, store)
    assert (load_tokenizer(store.files_path("m")) is not None) == loads


@pytest.mark.parametrize(
    ("own", "of_processor", "found"),
    [(None, {"chat_template": "p"}, "p"), ("t", {"chat_template": "p"}, "t"), (None, [], None)],
)
def test_chat_template_of_a_processor_is_taken_where_the_tokenizer_has_none(
    own: str | None, of_processor: Any, found: str | None, tmp_path: Path
) -> None:
    from flashclient.model.loaded import load_tokenizer

    tokenizer: Any = make_tokenizer()
    tokenizer.chat_template = own
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps(of_processor))
    assert getattr(load_tokenizer(tmp_path), "chat_template", "") == found


def test_tokenizer_of_vocabulary_and_merges_is_a_tokenizer(tmp_path: Path) -> None:
    from flashclient.model.loaded import load_tokenizer

    model = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("hello").input_ids) == "hello"


# The child process


@pytest.fixture
def in_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what conftest.py replaces."""
    monkeypatch.setattr("weightd.importing.convert.child", client_process.child)


@pytest.mark.usefixtures("in_child")
def test_child_process_derives_and_rehearses(originals: dict[str, Path], tmp_path: Path, store: Store) -> None:
    assert import_checkpoint(originals["llama"], store).model_class == "LlamaForCausalLM"
    folder = changed(originals["llama"], tmp_path / "m")
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"no client could run .*/m: generation_config\.json: "):
        import_checkpoint(folder, store)
    folder = changed(originals["llama"], tmp_path / "n", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"/n: the checkpoint lacks the tensor model\.layers\.1"):
        import_checkpoint(folder, store)


@pytest.mark.usefixtures("in_child")
def test_without_transformers_an_import_says_what_to_install(
    originals: dict[str, Path], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_process, "find_spec", lambda package: None if package == "transformers" else object())
    with pytest.raises(CheckpointError, match=r"an import needs transformers: pip install 'weightd\[import\]'"):
        import_checkpoint(originals["llama"], store)


@pytest.mark.usefixtures("in_child")
def test_where_python_may_not_be_started_an_import_says_so(
    originals: dict[str, Path], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "python"
    closed.touch(mode=0o600)
    monkeypatch.setattr("sys.executable", str(closed))
    with pytest.raises(CheckpointError, match=r"an import starts .*/python, which this user may not run"):
        import_checkpoint(originals["llama"], store)


@pytest.mark.usefixtures("in_child")
def test_child_that_dies_is_named_with_its_last_line(
    originals: dict[str, Path], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho something before >&2\necho killed by a test >&2\nexit 3\n")
    dying.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(dying))
    with pytest.raises(CheckpointError, match=r": killed by a test$"):
        import_checkpoint(originals["llama"], store)


# Unforeseen values

KEYS = [
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias", "dtype", "torch_dtype", "architectures",
    "model_type", "layer_types", "sliding_window", "pad_token_id", "bos_token_id", "eos_token_id", "text_config",
    "quantization_config", "auto_map", "attn_implementation", "output_attentions", "use_cache", "id2label",
    "num_labels", "chunk_size_feed_forward", "is_encoder_decoder", "per_layer_config", "transformers_version",
    "partial_rotary_factor", "attention_dropout", "return_dict", "transformers_weights", "problem_type",
]  # fmt: skip
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.floats()
    | st.sampled_from(["", "silu", "yarn", "float16", "1"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "0", "short_factor"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2))
def test_any_configuration_is_imported_or_refused(
    originals: dict[str, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as scratch, Store.open(Path(scratch) / "s", create=True) as store:
        folder = changed(originals["llama"], Path(scratch) / "m", **changes)
        with suppress(CheckpointError):
            import_checkpoint(folder, store)
        assert {path.name for path in store.path.iterdir()} <= {"catalog.mdb", "catalog.mdb-lock", "m"}
