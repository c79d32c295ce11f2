"""Recipes, derived from transformers' classes and proven on tiny instances."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn
from transformers import AutoConfig, BartConfig, LlamaConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.core_model_loading import revert_weight_conversion

from flashclient.errors import ModelError
from flashclient.recipes.derive import derive
from flashclient.recipes.ffns.sites import weightless
from flashclient.recipes.ffns.tiny import model_class, tiny_model
from flashclient.recipes.ffns.watching import watch
from flashclient.recipes.proof import prove
from flashclient.torch_state import one_thread
from weightd_proto.weightd_pb2 import (
    Activation,
    Bias,
    CheckpointTensor,
    DeriveRequest,
    Layer,
    MatrixSource,
    Recipe,
)


class Sine(nn.Module):
    """An activation that no kernel has."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


FEW_LAYERS = {"num_hidden_layers": 6}
DEEPSEEK = {"num_experts_per_tok": 6}


def published_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Of the tensors that transformers saves for the full-size model."""
    found, made_from = model_class(config)
    model = weightless(found, made_from)
    tied = dict(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


@one_thread()
def recipe_of(kind: str, **changes: Any) -> Recipe:
    config = AutoConfig.for_model(kind, **changes)
    return derive(request_of(config.to_dict(), published_shapes(config)))


def request_of(config: dict[str, Any], shapes: Mapping[str, Sequence[int]]) -> DeriveRequest:
    tensors = [CheckpointTensor(name=name, dtype="F32", shape=shape) for name, shape in shapes.items()]
    return DeriveRequest(config_json=json.dumps(config).encode(), tensors=tensors)


@pytest.mark.parametrize(
    ("kind", "changes", "layers", "places"),
    [
        ("llama", FEW_LAYERS, 6, {Layer.MODULE}),
        ("qwen2", FEW_LAYERS, 6, {Layer.MODULE}),
        ("gemma2", FEW_LAYERS, 6, {Layer.MODULE}),
        ("phi3", FEW_LAYERS, 6, {Layer.MODULE}),
        ("llama", FEW_LAYERS | {"vocab_size": 8}, 6, {Layer.MODULE}),
        ("falcon", FEW_LAYERS, 6, {Layer.MODULE}),
        ("falcon", FEW_LAYERS | {"alibi": True, "parallel_attn": False, "bias": True}, 6, {Layer.MODULE}),
        ("persimmon", FEW_LAYERS, 6, {Layer.MODULE}),
        ("gpt2", {"n_layer": 6}, 6, {Layer.MODULE}),
        ("openai-gpt", {"n_layer": 6}, 6, {Layer.MODULE}),
        ("bloom", {"n_layer": 6}, 6, {Layer.PARTS}),
        ("opt", FEW_LAYERS, 6, {Layer.PARTS}),
        ("bert", FEW_LAYERS, 6, {Layer.PARTS}),
        ("big_bird", FEW_LAYERS, 6, {Layer.PARTS}),
        ("falcon_h1", FEW_LAYERS | {"mlp_multipliers": [0.88, 0.58]}, 6, {Layer.PARTS}),
        ("mixtral", FEW_LAYERS, 6, {Layer.EXPERTS}),
        ("gpt_oss", FEW_LAYERS, 6, {Layer.EXPERTS}),
        ("llama4_text", FEW_LAYERS, 12, {Layer.EXPERTS, Layer.MODULE}),
        ("deepseek_v2", FEW_LAYERS | DEEPSEEK, 12, {Layer.EXPERTS, Layer.MODULE}),
        ("deepseek_v3", FEW_LAYERS, 9, {Layer.EXPERTS, Layer.MODULE}),
        ("deepseek_v4", FEW_LAYERS, 6, {Layer.EXPERTS}),
        ("zamba", {"num_hidden_layers": 12}, 2, {Layer.MODULE}),
        ("internlm3", FEW_LAYERS, 6, {Layer.MODULE}),
    ],
)
def test_a_recipe_is_derived_and_proven(kind: str, changes: dict[str, Any], layers: int, places: set[int]) -> None:
    recipe = recipe_of(kind, **changes)
    assert len(recipe.model.layers) == len(recipe.ffns) == layers
    assert {layer.place for layer in recipe.model.layers} == places
    names = {source.name for source in recipe.resident}
    for layer, ffn in zip(recipe.model.layers, recipe.ffns, strict=True):
        assert names.isdisjoint(f"{layer.module}.{weight}" for weight in layer.weights)
        assert names >= {bias.tensor for bias in layer.biases}
        assert not layer.output_bias or layer.output_bias in names
        assert len(ffn.experts) == max(1, layer.experts)
        assert all(len(expert.parts) == len(recipe.model.bundle.parts) for expert in ffn.experts)


def test_a_recipe_of_a_dense_model() -> None:
    recipe = recipe_of("phi3", **FEW_LAYERS)
    model = recipe.model
    assert (model.family, model.model_class, model.bundle.hidden_size) == ("phi3", "Phi3ForCausalLM", 3072)
    assert [part.name for part in model.bundle.parts] == ["gate", "up", "down"]
    assert model.activation == Activation(function="silu")
    assert model.layers[5] == Layer(
        module="model.layers.5.mlp",
        neurons=8192,
        place=Layer.MODULE,
        weights=["gate_up_proj.weight", "gate_up_proj.weight", "down_proj.weight"],
    )
    assert list(recipe.ffns[5].experts[0].parts) == [
        MatrixSource(tensor="model.layers.5.mlp.gate_up_proj.weight", first=0, step=1),
        MatrixSource(tensor="model.layers.5.mlp.gate_up_proj.weight", first=8192, step=1),
        MatrixSource(tensor="model.layers.5.mlp.down_proj.weight", columns=True, first=0, step=1),
    ]
    assert json.loads(recipe.config_json)["model_type"] == "phi3"


def test_experts_are_parts_of_the_published_tensors() -> None:
    """The published experts are separate matrices, or one tensor whose rows are interleaved."""
    recipe = recipe_of("mixtral", **FEW_LAYERS)
    prefix = "model.layers.2.block_sparse_moe.experts.7"
    assert list(recipe.ffns[2].experts[7].parts) == [
        MatrixSource(tensor=f"{prefix}.w1.weight", step=1),
        MatrixSource(tensor=f"{prefix}.w3.weight", step=1),
        MatrixSource(tensor=f"{prefix}.w2.weight", columns=True, step=1),
    ]
    recipe = recipe_of("gpt_oss", **FEW_LAYERS)
    prefix = "model.layers.2.mlp.experts"
    assert list(recipe.ffns[2].experts[7].parts) == [
        MatrixSource(tensor=f"{prefix}.gate_up_proj", matrix=7, columns=True, first=0, step=2),
        MatrixSource(tensor=f"{prefix}.gate_up_proj", matrix=7, columns=True, first=1, step=2),
        MatrixSource(tensor=f"{prefix}.down_proj", matrix=7, first=0, step=1),
    ]
    layer = recipe.model.layers[2]
    assert (layer.neurons, layer.experts) == (128 * 2880, 128)
    assert list(layer.biases) == [
        Bias(part="gate", tensor=f"{prefix}.gate_up_proj_bias", first=0, step=2),
        Bias(part="up", tensor=f"{prefix}.gate_up_proj_bias", first=1, step=2),
    ]
    assert layer.output_bias == f"{prefix}.down_proj_bias"


@pytest.mark.parametrize(
    ("model_type", "changes", "activation"),
    [
        ("bamboo", {"hidden_act": "relu"}, Activation(function="gated_relu", instead=True)),
        (
            "sparsellama",
            {"hidden_act": "fatrelu", "hidden_act_param": 0.01},
            Activation(function="fatrelu", parameter=0.01, instead=True),
        ),
    ],
)
@one_thread()
def test_an_activation_that_the_class_does_not_have(
    model_type: str, changes: dict[str, Any], activation: Activation
) -> None:
    """It is proven too: against the class with that activation."""
    kind = "mistral" if model_type == "bamboo" else "llama"
    config = AutoConfig.for_model(kind, num_hidden_layers=2)
    values = config.to_dict() | {"model_type": model_type} | changes
    recipe = derive(request_of(values, published_shapes(config)))
    assert recipe.model.activation == activation


@pytest.mark.parametrize("kind", ["mamba", "bitnet"])
def test_a_model_of_which_nothing_can_be_streamed_is_refused(kind: str) -> None:
    with pytest.raises(ModelError, match=r"^no FFN of \w+ForCausalLM could be recognised, so nothing of it can be"):
        recipe_of(kind)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "sine"}, "its hidden_act is 'sine', and kernels compute relu, "),
        ({"rms_norm_eps": float("nan")}, "a tiny instance of it computes numbers that are not finite: correct"),
    ],
)
@one_thread()
def test_the_reason_why_nothing_is_recognised_is_given(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ACT2FN, "sine", Sine)
    with pytest.raises(ModelError, match=rf"^no FFN of LlamaForCausalLM could be .* streamed; {reason}"):
        recipe_of("llama", num_hidden_layers=2, **changes)


@pytest.mark.parametrize(
    ("config", "ending"),
    [
        (LlamaConfig(num_hidden_layers=1, architectures=["LlamaModel"]), "; it was saved from LlamaModel, and Llama"),
        (BartConfig(decoder_layers=1), "; bart has an encoder, too, and only a checkpoint of its decoder alone runs"),
    ],
)
@one_thread()
def test_a_checkpoint_of_another_kind_of_model_is_called_so(config: PreTrainedConfig, ending: str) -> None:
    with pytest.raises(ModelError, match=f"^the checkpoint lacks the tensor .*{ending}"):
        derive(request_of(config.to_dict(), {}))


@one_thread()
def wrong_recipe(kind: str, **change: Any) -> None:
    """Proves a recipe whose sites are changed; `parts` gives the order of gate and up."""
    found, config = model_class(AutoConfig.for_model(kind))
    tiny = tiny_model(found, config)
    sites = watch(tiny).sites
    if "parts" in change:
        gate, up, down = sites[0].parts
        change = {"parts": (replace(gate, rows=up.rows), replace(up, rows=gate.rows), down)}
    prove(tiny, weightless(found, tiny.config), [replace(site, **change) for site in sites])


def test_experts_with_gate_and_up_exchanged_are_refused() -> None:
    with pytest.raises(
        ModelError,
        match=r"^model\.layers\.0\.mlp\.experts \(MixtralExperts\) computes something else when it is streamed: values "
        r"of up to \S+ differ by \S+$",
    ):
        wrong_recipe("mixtral", parts="exchanged")


def test_a_wrong_formula_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"^LlamaForCausalLM cannot be streamed: .*layers\.0\.mlp does not compute gelu"
    ):
        wrong_recipe("llama", activation=Activation(function="gelu"))


def test_a_class_that_changes_its_weights_is_refused() -> None:
    """RWKV divides weights of the FFNs when it runs."""
    with pytest.raises(ModelError, match=r"^RwkvForCausalLM cannot be streamed: .*feed_forward\.value\.weight.*$"):
        recipe_of("rwkv", **FEW_LAYERS)


def test_a_config_that_transformers_refuses() -> None:
    with pytest.raises(ModelError, match=r"^config\.json: .*$"):
        derive(request_of({"model_type": "llama", "hidden_size": "many"}, {}))


@pytest.mark.parametrize(
    ("values", "refusal"),
    [
        (
            {"model_type": "llama", "num_hidden_layers": 10**9},
            "num_hidden_layers = 1000000000, expected a number",
        ),
        (
            {"model_type": "llama", "intermediate_size": 2**40},
            "intermediate_size = 1099511627776, expected a number",
        ),
        ({"model_type": "x", "text_config": {"n_layer": 5000}}, "n_layer = 5000, expected a number from 0 to 4096"),
        ({"model_type": "x", "vocab_size": -1}, "vocab_size = -1, expected a number from 1"),
        ({"model_type": "x", "chunk_size": -2}, "chunk_size = -2, expected a number from -1"),
    ],
)
def test_sizes_beyond_any_model_are_refused_before_it_is_made(values: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ModelError, match=refusal):
        derive(request_of(values, {}))


@pytest.mark.parametrize("config_json", [b"[]", b"{", b"\xff"])
def test_a_config_that_is_no_object_is_refused(config_json: bytes) -> None:
    with pytest.raises(ModelError, match=r"^config\.json is no JSON"):
        derive(DeriveRequest(config_json=config_json))


def test_a_derivation_is_the_same_every_time() -> None:
    one, other = (recipe_of("qwen2_moe", num_hidden_layers=2).SerializeToString(deterministic=True) for _ in range(2))
    assert one == other
