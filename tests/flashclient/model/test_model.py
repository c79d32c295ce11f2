"""The streamed model against transformers' dense one: logits, tokens, and the refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_config, make_model
from cut_model import ArraySource, CutModel, FetchServer, cut
from transformers import AutoModelForCausalLM

from flashclient._native import Workers
from flashclient.daemon.channel import Connection
from flashclient.errors import ModelError
from flashclient.kernels.decode_attention import IMPLEMENTATION
from flashclient.model.absent_weights import AbsentWeight
from flashclient.model.build import BuiltModel, build_model, read_generation_config
from flashclient.source.bundle_source import BundleSource
from flashclient.source.grpc_chunks import GrpcSource
from weightd_proto import weightd_pb2

TOLERANCE = 1e-3
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {},
    "opt-350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "opt-without-bias": {"enable_bias": False},
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "gemma3": {},
}
SOURCES = ("arrays", "single bundles", "grpc 10 %", "grpc 100 %")


def dense_model(case: str, dtype: str = "float32", **changes: Any) -> Any:
    return make_model(make_config(case.split("-")[0], **(FAMILIES[case] | changes)), dtype)


@contextmanager
def open_source(kind: str, parts: CutModel, folder: Path) -> Iterator[BundleSource]:
    """Every source of bundles. Each test of the forward pass runs with all of them."""
    if not kind.startswith("grpc"):
        yield ArraySource(parts, [1] if kind == "single bundles" else [61, 5])
        return
    share = int(kind.split()[1]) / 100
    ffn_bytes = sum(layer.nbytes for layer in parts.bundles)
    with FetchServer([parts], folder / "socket") as server:
        connection = Connection(server.address, 10.0)
        source = GrpcSource(connection, parts.record, pool_bytes=int(share * ffn_bytes))
        try:
            yield source
        finally:
            connection.close()
            source.close()


def build(parts: CutModel, source: BundleSource, folder: Path) -> BuiltModel:
    folder = parts.save_files(folder)
    return build_model(parts.record, folder, source, lambda layer: parts.placements[layer], Workers(2))


def streamed_model(parts: CutModel, source: BundleSource, folder: Path) -> Any:
    return build(parts, source, folder).model


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_are_those_of_the_dense_model(case: str, tmp_path: Path) -> None:
    dense = dense_model(case)
    parts = cut(dense)
    streamed = streamed_model(parts, ArraySource(parts, [61, 5]), tmp_path)
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0  # padded left
    with torch.no_grad():
        for columns in (slice(0, 40), slice(0, 8)):
            inputs = {"input_ids": ids[:, columns], "attention_mask": mask[:, columns]}
            difference = (streamed(**inputs).logits - dense(**inputs).logits)[mask[:, columns].bool()]
            assert difference.abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("case", ["opt", "gemma3"])
def test_greedy_tokens_are_those_of_the_dense_model(case: str, kind: str, tmp_path: Path) -> None:
    dense = dense_model(case)
    parts = cut(dense)
    with open_source(kind, parts, tmp_path) as source:
        streamed = streamed_model(parts, source, tmp_path)
        for length in (3, 30):
            ids = torch.arange(5, 5 + length).unsqueeze(0)
            made = streamed.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
            assert_greedy(dense, made, length)


def assert_greedy(dense: Any, sequences: torch.Tensor, prompt_tokens: int) -> None:
    """Each new token is the dense model's likeliest, unless its two likeliest are closer than the tolerance."""
    with torch.no_grad():
        logits = dense(sequences).logits[:, prompt_tokens - 1 : -1]
    first, second = logits.topk(2).values.unbind(-1)
    certain = first - second > TOLERANCE
    assert certain.float().mean() > 0.9
    assert torch.equal(sequences[:, prompt_tokens:][certain], logits.argmax(-1)[certain])


def test_bits_are_those_of_every_source(tmp_path: Path) -> None:
    parts = cut(dense_model("llama", "bfloat16"))
    ids = torch.arange(3, 43).unsqueeze(0)
    results: list[list[torch.Tensor]] = []
    for kind in (*SOURCES, SOURCES[2]):
        folder = tmp_path / str(len(results))
        folder.mkdir()
        with open_source(kind, parts, folder) as source, torch.no_grad():
            streamed = streamed_model(parts, source, folder)
            results.append([streamed(ids).logits, streamed(ids[:, :9]).logits, streamed(ids[:, 9:10]).logits])
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_dtype(dtype: str, tmp_path: Path) -> None:
    dense = dense_model("qwen2", dtype)
    parts = cut(dense)
    streamed = streamed_model(parts, ArraySource(parts, [61]), tmp_path)
    assert {parameter.dtype for parameter in streamed.parameters()} == {getattr(torch, dtype)}
    ids = torch.arange(3, 23).unsqueeze(0)
    with torch.no_grad():
        expected, actual = dense.float()(ids).logits, streamed(ids).logits.float()
    # Rounding of the attention and norms in half precision remains.
    assert (actual - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_resident_tensors_are_views(tmp_path: Path) -> None:
    parts = cut(dense_model("llama-tied"))
    source = ArraySource(parts, [61])
    streamed = streamed_model(parts, source, tmp_path)
    begin = source.resident.ctypes.data
    for name, parameter in streamed.named_parameters():
        if isinstance(parameter, AbsentWeight):
            continue
        assert begin <= parameter.data_ptr() < begin + source.resident.nbytes, name
        assert not parameter.requires_grad
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight
    assert not streamed.training


def test_resident_tensors_keep_the_dtype_of_the_import(tmp_path: Path) -> None:
    """Of some models, transformers keeps tensors in fp32 where the others have 16 bits."""
    dense = dense_model("llama", "bfloat16")
    dense.model.norm.to(torch.float32)
    parts = cut(dense)
    streamed = streamed_model(parts, ArraySource(parts, [61]), tmp_path)
    assert streamed.model.norm.weight.dtype == torch.float32
    assert streamed.model.layers[0].input_layernorm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("chosen", [None, "eager", "sdpa"])
def test_attention_is_the_kernel_unless_the_config_names_another(chosen: str | None, tmp_path: Path) -> None:
    parts = cut(dense_model("llama"))
    config = json.loads(parts.files["config.json"]) | ({} if chosen is None else {"attn_implementation": chosen})
    parts.files["config.json"] = json.dumps(config).encode()
    streamed = streamed_model(parts, ArraySource(parts, [61]), tmp_path)
    assert streamed.config._attn_implementation == (chosen or IMPLEMENTATION)


def test_generation_settings_are_those_of_transformers(tmp_path: Path) -> None:
    """Older checkpoints have them in config.json, which counts only without a generation_config.json."""
    dense_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"repetition_penalty": 1.5, "suppress_tokens": [7]}))
    for _ in range(2):
        expected = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
        assert read_generation_config(tmp_path).to_dict() == expected.to_dict()
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
    assert expected.repetition_penalty == 1.5


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_config_that_has_heads_for_further_tokens_asks_for_no_drafts(file: str, tmp_path: Path) -> None:
    """MiniMax-M2's has use_mtp. transformers' generate() then looks for heads that it has not loaded."""
    (tmp_path / file).write_text(json.dumps({"model_type": "minimax_m2", "use_mtp": True}))
    assert getattr(read_generation_config(tmp_path), "use_mtp", None) is None


def test_model_holds_no_ffn_weights(tmp_path: Path) -> None:
    for case in ("opt", "gemma3"):
        parts = cut(dense_model(case))
        streamed = streamed_model(parts, ArraySource(parts, [61]), tmp_path)
        ffns = [one for name, one in streamed.named_parameters() if "mlp" in name or "fc" in name]
        assert all(isinstance(one, AbsentWeight) for one in ffns)


def _with_tensors(parts: CutModel, tensors: list[weightd_pb2.Tensor]) -> CutModel:
    record = weightd_pb2.Model()
    record.CopyFrom(parts.record)
    del record.resident[:]
    record.resident.extend(tensors)
    return CutModel(record, parts.bundles, parts.placements, parts.resident, parts.files)


def test_refuses_missing_and_unexpected_tensors(tmp_path: Path) -> None:
    parts = cut(dense_model("llama"))
    tensors = list(parts.record.resident)
    fewer = [tensor for tensor in tensors if tensor.name != "model.norm.weight"]
    with pytest.raises(ModelError, match=r"lacks tensors: model\.norm\.weight"):
        streamed_model(_with_tensors(parts, fewer), ArraySource(parts, [9]), tmp_path)
    extra = weightd_pb2.Tensor()
    extra.CopyFrom(tensors[0])
    extra.name = "model.extra"
    with pytest.raises(ModelError, match=r"that its config does not: model\.extra"):
        streamed_model(_with_tensors(parts, [*tensors, extra]), ArraySource(parts, [9]), tmp_path)


def test_refuses_a_tensor_of_another_shape(tmp_path: Path) -> None:
    parts = cut(dense_model("llama"))
    for tensor in parts.record.resident:
        if tensor.name == "model.norm.weight":
            tensor.shape[:] = [8, 8]
    with pytest.raises(ModelError, match=r"does not fit its config: .*model\.norm\.weight"):
        streamed_model(parts, ArraySource(parts, [9]), tmp_path)


def old(parts: CutModel) -> CutModel:
    """With a record as it was before a record said how its FFNs are installed."""
    record = weightd_pb2.Model()
    record.CopyFrom(parts.record)
    for field in ("model_class", "activation"):
        record.ClearField(field)
    layers = [weightd_pb2.Layer(module=layer.module, neurons=layer.neurons) for layer in record.layers]
    del record.layers[:]
    record.layers.extend(layers)
    return CutModel(record, parts.bundles, parts.placements, parts.resident, parts.files)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_record_of_before_is_completed(case: str, tmp_path: Path) -> None:
    parts = cut(dense_model(case))
    built = build(old(parts), ArraySource(parts, [61]), tmp_path)
    assert built.record == parts.record


def test_refuses_an_unknown_architecture_of_before(tmp_path: Path) -> None:
    parts = old(cut(dense_model("llama")))
    parts.files["config.json"] = parts.files["config.json"].replace(b'"llama"', b'"gpt2"')
    with pytest.raises(ModelError, match=r"unknown architecture \(model_type 'gpt2'\): Gemma3ForCausalLM, Llama"):
        streamed_model(parts, ArraySource(parts, [9]), tmp_path)


def test_refuses_an_activation_without_kernel(tmp_path: Path) -> None:
    parts = cut(dense_model("llama"))
    parts.record.activation.function = "unheard_of"
    match = r"no kernel for the FFNs of .*: no kernel for activation 'unheard_of': .*; upgrade"
    with pytest.raises(ModelError, match=match):
        streamed_model(parts, ArraySource(parts, [9]), tmp_path)


def test_refuses_a_learned_activation_of_before(tmp_path: Path) -> None:
    parts = old(cut(dense_model("llama")))
    parts.files["config.json"] = parts.files["config.json"].replace(b'"silu"', b'"xielu"')
    with pytest.raises(ModelError, match="no kernel for activation XIELU"):
        streamed_model(parts, ArraySource(parts, [9]), tmp_path)


def _renamed(record: weightd_pb2.Model) -> None:
    record.layers[1].module = "model.layers.1.feed_forward"


def _reshaped(record: weightd_pb2.Model) -> None:
    record.layers[1].neurons += 1


def _without_up(record: weightd_pb2.Model) -> None:
    record.layers[0].weights[1] = "up.weight"


MISFITS: dict[str, tuple[Callable[[weightd_pb2.Model], object], str]] = {
    "no such class": (
        lambda record: setattr(record, "model_class", "Llama9ForCausalLM"),
        "needs Llama9ForCausalLM, which",
    ),
    "no class of a model": (
        lambda record: setattr(record, "model_class", "AutoConfig"),
        "needs AutoConfig, which trans",
    ),
    "another class": (
        lambda record: setattr(record, "model_class", "OPTForCausalLM"),
        "model_type 'llama', OPTForCausalLM needs 'opt'",
    ),
    "no such module": (
        _renamed,
        r"does not fit LlamaForCausalLM of .*: there is no module model\.layers\.1\.feed_forward",
    ),
    "no such weight": (_without_up, r"there is no module model\.layers\.0\.mlp\.up; use the transformers"),
    "another shape": (
        _reshaped,
        r"gate_proj\.weight has shape \(176, 64\), the store \(177, 64\); use the transformers",
    ),
    "an unknown place": (
        lambda record: setattr(record.layers[0], "place", 9),
        "no way to install .*; upgrade flashclient",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_refuses_a_record_that_does_not_fit_the_class(misfit: str, tmp_path: Path) -> None:
    parts = cut(dense_model("llama"))
    change, said = MISFITS[misfit]
    change(parts.record)
    with pytest.raises(ModelError, match=said):
        streamed_model(parts, ArraySource(parts, [9]), tmp_path)


def test_refuses_bundles_without_kernel(tmp_path: Path) -> None:
    parts = cut(dense_model("llama"))
    for part in parts.record.bundle.parts:
        part.encoding.format = "Q8_0"
    with pytest.raises(ModelError, match=r"no kernel for the FFNs of model '.*', stored as Q8_0: .*; upgrade flash"):
        streamed_model(parts, ArraySource(parts, [9]), tmp_path)


def test_a_tensor_at_an_odd_place_is_copied(tmp_path: Path) -> None:
    parts = cut(dense_model("llama"))
    for tensor in parts.record.resident:
        tensor.offset_bytes += 1
    shifted = CutModel(parts.record, parts.bundles, parts.placements, b"\0" + parts.resident, parts.files)
    ids = torch.arange(3, 9).unsqueeze(0)
    with torch.no_grad():
        actual = streamed_model(shifted, ArraySource(shifted, [9]), tmp_path)(ids).logits
        assert (actual - dense_model("llama")(ids).logits).abs().max() < TOLERANCE
    assert np.isfinite(actual.numpy()).all()
