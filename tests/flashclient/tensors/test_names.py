"""Places of a model's tensors in its checkpoint, against the tensors themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flashclient.errors import ModelError
from flashclient.tensors.names import FURTHER_LAYERS, find_tensors, kept_in_f32, part_source, places_of
from flashclient.tensors.places import Joined, Piece, Place, UntraceableError, gather, matrix, message, stack
from flashclient.tensors.tracing import TracedTensor
from weightd_proto.weightd_pb2 import MatrixSource, Slice, TensorSource

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DENSE = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
MIXTURE = DENSE | {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "codegen": GPT | {"n_ctx": 64, "rotary_dim": 4},
    "deepseek_v3": MIXTURE | LATENT,
    "falcon": SIZES | {"num_kv_heads": 2, "new_decoder_architecture": True},
    "gemma2": DENSE,
    "glm4": DENSE,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
    },
    "gpt_neox": SIZES | {"intermediate_size": 48},
    "gpt_oss": MIXTURE,
    "gptj": GPT | {"rotary_dim": 4},
    "granitemoe": MIXTURE,
    "jamba": MIXTURE | {"mamba_d_state": 4, "mamba_dt_rank": 4},
    "llama": DENSE,
    "mixtral": MIXTURE,
    "olmoe": MIXTURE,
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": DENSE,
    "phi3": DENSE,
    "qwen2_moe": MIXTURE,
    "qwen3_moe": MIXTURE,
    "xglm": {
        "vocab_size": 96,
        "d_model": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "attention_heads": 4,
        "max_position_embeddings": 64,
    },
}


def make(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(KINDS[kind] | changes))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(model.config)  # type: ignore[no-untyped-call]
    return made


def saved(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, Place]:
    return {name: Piece.whole(name, tuple(tensor.shape)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_found_in_the_published_checkpoint(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    tensors = saved(model, tmp_path)
    found = find_tensors(on_meta(model), whole(tensors))
    state = model.state_dict()
    assert state.keys() - found.places.keys() <= getattr(model, "all_tied_weights_keys", {}).keys()
    assert not found.tied
    assert not found.left_out
    for name, place in found.places.items():
        assert torch.equal(gather(message(place), tensors).reshape(state[name].shape), state[name]), name


def test_model_is_as_before(tmp_path: Path) -> None:
    model = make("mixtral")
    meta = on_meta(model)
    before = dict(meta.named_parameters())
    find_tensors(meta, whole(saved(model, tmp_path)))
    assert all(value is before[name] for name, value in meta.named_parameters())
    assert "_weight_conversions" not in vars(meta)


def test_base_models_and_models_with_a_head_are_found(tmp_path: Path) -> None:
    """Names with and without the prefix of the base model."""
    model = make("llama", tie_word_embeddings=True)
    tensors = {name.removeprefix("model."): value for name, value in saved(model, tmp_path).items()}
    found = find_tensors(on_meta(model), whole(tensors))
    assert message(found.places["model.norm.weight"]) == TensorSource(tensor="norm.weight")


def test_tied_weights(tmp_path: Path) -> None:
    model = make("llama", tie_word_embeddings=True)
    tensors = saved(model, tmp_path)
    both = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    found = find_tensors(on_meta(model), whole(both))
    assert found.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    del both["model.embed_tokens.weight"]
    found = find_tensors(on_meta(model), whole(both))
    assert message(found.places["model.embed_tokens.weight"]).tensor == "lm_head.weight"
    assert "lm_head.weight" not in found.places
    del both["lm_head.weight"]
    with pytest.raises(ModelError, match=r"lacks the tensor model\.embed_tokens\.weight"):
        find_tensors(on_meta(model), whole(both))


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    model = make("mixtral")
    tensors = saved(model, tmp_path)
    expert = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    without = {name: value for name, value in tensors.items() if name != expert}
    with pytest.raises(
        ModelError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj cannot be made .* concatenated"
    ):
        find_tensors(on_meta(model), whole(without))
    with pytest.raises(ModelError, match=r"norm\.weight has shape \[31\] in the checkpoint, .* says \[32\]"):
        find_tensors(on_meta(model), whole(tensors | {"model.norm.weight": torch.ones(31)}))
    with pytest.raises(ModelError, match=r"holds 1 tensors that .* no place for, first extra\.bias: correct"):
        find_tensors(on_meta(model), whole(tensors | {"extra.bias": torch.ones(3)}))


def test_what_transformers_leaves_out_is_named_with_the_reason(tmp_path: Path) -> None:
    model = make("deepseek_v3")
    more = {
        "model.layers.61.embed_tokens.weight": torch.ones(3),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
        "mtp.layers.0.weight": torch.ones(3),
    }
    found = find_tensors(on_meta(model), whole(saved(model, tmp_path) | more))
    assert {name for names in found.left_out.values() for name in names} == set(more)
    assert len(found.left_out) == 3


@pytest.mark.parametrize("field", FURTHER_LAYERS)
def test_layers_that_predict_further_tokens_are_left_out(field: str, tmp_path: Path) -> None:
    model = make("mixtral", **{field: 1})
    tensors = saved(model, tmp_path)
    name = f"model.layers.{model.config.num_hidden_layers}.enorm.weight"
    found = find_tensors(on_meta(model), whole(tensors | {name: torch.ones(3)}))
    assert [names for names in found.left_out.values() if name in names]
    with pytest.raises(ModelError, match=r"no place for, first .*enorm"):
        find_tensors(on_meta(model), whole(tensors | {name.replace("2", "3"): torch.ones(3)}))


MASK = (1, 1, 64, 64)


@pytest.mark.parametrize(
    ("kind", "buffers"),
    [
        ("gpt2", {"transformer.h.0.attn.bias": MASK, "transformer.h.0.attn.masked_bias": ()}),
        ("gptj", {"transformer.h.1.attn.bias": MASK, "transformer.h.1.attn.masked_bias": ()}),
        (
            "gpt_neo",
            {
                "transformer.h.0.attn.attention.bias": MASK,
                "transformer.h.0.attn.attention.masked_bias": (1,),
            },
        ),
        (
            "gpt_neox",
            {"gpt_neox.layers.0.attention.bias": MASK, "gpt_neox.layers.0.attention.masked_bias": ()},
        ),
        ("gpt_bigcode", {"transformer.h.0.attn.bias": MASK}),
        ("codegen", {"transformer.h.0.attn.causal_mask": MASK}),
        ("xglm", {"model.embed_positions.weights": (66, 32)}),
        ("llama", {"model.layers.0.self_attn.rotary_emb.cos_cached": (64, 8)}),
    ],
)
def test_buffers_of_older_versions_are_left_out(kind: str, buffers: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    model = make(kind)
    tensors = saved(model, tmp_path) | {name: torch.ones(shape) for name, shape in buffers.items()}
    found = find_tensors(on_meta(model), whole(tensors))
    assert {name for names in found.left_out.values() for name in names} == set(buffers)


def test_a_bias_that_is_no_mask_is_not_left_out(tmp_path: Path) -> None:
    model = make("gptj")
    with pytest.raises(ModelError, match=r"no place for, first transformer\.h\.0\.attn\.bias: correct"):
        find_tensors(on_meta(model), whole(saved(model, tmp_path) | {"transformer.h.0.attn.bias": torch.ones(64)}))


def test_what_transformers_keeps_in_f32() -> None:
    kept = kept_in_f32(on_meta(make("deepseek_v3")))
    assert kept == {"model.layers.1.mlp.gate.e_score_correction_bias": ["F16", "BF16"]}
    assert kept_in_f32(on_meta(make("gpt_oss")))["model.norm.weight"] == ["F16"]
    assert not kept_in_f32(on_meta(make("llama")))


# Parts of FFNs


def test_parts_of_experts_are_rows_of_the_published_tensors(tmp_path: Path) -> None:
    model = make("mixtral")
    places = find_tensors(on_meta(model), whole(saved(model, tmp_path))).places
    gate_up, down = (places[f"model.layers.1.mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
    neurons = 48
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    assert part_source(gate_up, (2, slice(neurons), slice(None))) == MatrixSource(tensor=f"{prefix}.w1.weight", step=1)
    up = part_source(gate_up, (2, slice(neurons, None), slice(None)))
    assert up == MatrixSource(tensor=f"{prefix}.w3.weight", step=1)
    assert part_source(down, (2, slice(None), slice(None)), 1) == MatrixSource(
        tensor=f"{prefix}.w2.weight", columns=True, step=1
    )


def test_parts_may_be_fused_interleaved_and_transposed(tmp_path: Path) -> None:
    model = make("gpt_oss")
    places = find_tensors(on_meta(model), whole(saved(model, tmp_path))).places
    name = "model.layers.0.mlp.experts.gate_up_proj"  # [experts, hidden, 2 * neurons], gate and up in turn
    assert part_source(places[name], (3, slice(None), slice(1, None, 2)), 1) == MatrixSource(
        tensor=name, matrix=3, columns=True, first=1, step=2
    )
    model = make("phi3")
    places = find_tensors(on_meta(model), whole(saved(model, tmp_path / "phi3"))).places
    name = "model.layers.0.mlp.gate_up_proj.weight"
    assert part_source(places[name], (slice(48, None), slice(None))) == MatrixSource(tensor=name, first=48, step=1)


def test_part_that_is_spread_over_tensors_is_refused() -> None:
    place = stack([Piece.whole(name, (4,)) for name in "ab"], 0)
    with pytest.raises(UntraceableError, match=r"a matrix of \[2, 4\] lies in several tensors: \['a', 'b'\]"):
        matrix(place)
    with pytest.raises(UntraceableError, match="are not a part of an FFN"):
        matrix(Piece.whole("a", (4, 8)).sliced(1, 0, 4))


# Places, against torch


def views(a: Any, b: Any, c: Any) -> list[Any]:
    """What loaders do with tensors of shapes [4, 6, 8], [6, 8] and [6, 8]."""
    interleaved = a.reshape(4, 3, 2, 8).transpose(1, 2).reshape(4, 6, 8)
    halves = torch.chunk(a, 2, dim=1)
    stacked = torch.stack([b, c], dim=0)
    return [
        a[1:3, ::2],
        a.transpose(0, 2)[3:, 1:2],
        a.permute(2, 0, 1),
        interleaved,
        interleaved[:, 1::2, 3:5],
        torch.cat([halves[1], halves[0]], dim=1)[:, 2:5],
        torch.cat(halves, dim=1),
        stacked,
        stacked.transpose(0, 1)[::3],
        stacked.reshape(12, 8),
        stacked[1],
        torch.stack([b, c], dim=2)[1:5, 2:3],
        torch.stack([b, c], dim=0).reshape(2, 48).reshape(12, 8)[3:9],
        torch.cat([b, c], dim=1)[:, 3::3],
        torch.cat([b, c], dim=0)[5:7],
        a.split([1, 3])[1],
        b.unsqueeze(0).squeeze(0),
    ]


SHAPES = {"a": (4, 6, 8), "b": (6, 8), "c": (6, 8)}


@pytest.mark.parametrize("number", range(17))
def test_places_follow_what_torch_does(number: int) -> None:
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    expected = views(*tensors.values())[number]
    traced = views(*(TracedTensor.whole(name, shape, torch.float32) for name, shape in SHAPES.items()))[number]
    assert traced.place.shape == expected.shape
    source = message(traced.place)
    assert torch.equal(gather(source, tensors).reshape(expected.shape), expected)
    (place,) = places_of({"b": source}, SHAPES).values()
    assert torch.equal(gather(message(place), tensors).reshape(expected.shape), expected)


def test_what_computes_new_values_is_refused() -> None:
    with pytest.raises(UntraceableError, match="computes new values"):
        _ = TracedTensor.whole("a", (4, 4), torch.float32) + 1
    with pytest.raises(UntraceableError, match="cannot be told as"):
        Piece.whole("a", (4, 6)).permuted((1, 0)).reshaped((3, 8))
    with pytest.raises(UntraceableError, match="cannot be told as"):
        Joined(1, False, (Piece.whole("a", (4, 6)),) * 2).reshaped((6, 8))
    with pytest.raises(UntraceableError, match="across its dimensions"):
        message(Piece.whole("a", (4, 6)).reshaped((24,)))
    with pytest.raises(UntraceableError, match="has other dimensions"):
        message(Piece.whole("a", (4, 6)).selected(0, 1))
    assert message(Piece.whole("a", (4, 6)).sliced(0, 1, 3)).slice == Slice(
        of=TensorSource(tensor="a"), dim=0, begin=1, end=3, step=1
    )
