"""FFNs of every kind, installed by the record: logits and tokens of the streamed model against the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_model
from cut_model import ArraySource, cut
from ffn_sites import SITES
from transformers import AutoConfig
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from flashclient._native import Workers
from flashclient.errors import AbsentWeightError, ModelError
from flashclient.model.absent_weights import AbsentWeight
from flashclient.model.build import build_model
from flashclient.model.install import streamed_ffns
from weightd_proto.weightd_pb2 import Layer

TOLERANCE = 1e-3
IDS = torch.arange(3, 31).view(2, 14)
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "max_position_embeddings": 128}
_GATED = _SIZES | _HEADS | {"intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_EXPERTS = _GATED | {"num_local_experts": 5, "num_experts_per_tok": 2}
_GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 56}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
# Sizes of a tiny model; every field that is not a size is the class's default unless a test needs another.
CONFIGS: dict[str, dict[str, Any]] = {
    "biogpt": _SIZES | {"intermediate_size": 56, "num_attention_heads": 4},
    "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": _SIZES | {"num_attention_heads": 4, "bias": True},
    "falcon-sequential": _SIZES | {"num_attention_heads": 4, "parallel_attn": False, "alibi": True},
    "gpt2": _GPT2,
    "gpt2-quick": _GPT2 | {"activation_function": "quick_gelu"},
    "gpt_oss": _EXPERTS | {"head_dim": 8, "sliding_window": 8, "layer_types": ["full_attention"] * 3},
    "mixtral": _EXPERTS,
    "mpt": {"vocab_size": 96, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128},
    "opt": _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_attention_heads": 4},
    "phi3": _GATED,
    "rwkv": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "context_length": 64, "rescale_every": 0},
    "starcoder2": _GATED,
}


def dense_model(case: str, dtype: str = "float32") -> Any:
    kind = case.partition("-")[0]
    return make_model(AutoConfig.for_model(kind, **CONFIGS[case]), dtype)


def streamed_model(dense: Any, folder: Path, chunks: tuple[int, ...] = (61, 5)) -> Any:
    parts = cut(dense)
    folder.mkdir(exist_ok=True)
    parts.save_files(folder)
    source = ArraySource(parts, list(chunks))
    return build_model(parts.record, folder, source, parts.placements.__getitem__, Workers(2)).model


@pytest.mark.parametrize("case", CONFIGS)
def test_logits_and_tokens_are_those_of_the_dense_model(case: str, tmp_path: Path) -> None:
    dense = dense_model(case)
    streamed = streamed_model(dense, tmp_path)
    with torch.no_grad():
        expected, made = dense(IDS), streamed(IDS)
        assert (made.logits - expected.logits).abs().max() < TOLERANCE
        tokens = [
            model.generate(IDS[:, :5], attention_mask=torch.ones(2, 5), max_new_tokens=8, do_sample=False)
            for model in (dense, streamed)
        ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("case", CONFIGS)
def test_weights_are_absent_under_their_names(case: str, tmp_path: Path) -> None:
    dense = dense_model(case)
    streamed = streamed_model(dense, tmp_path)
    state = {name: tensor.shape for name, tensor in dense.state_dict().items()}
    assert {name: tensor.shape for name, tensor in streamed.state_dict().items()} == state
    site = SITES[dense.config.model_type]
    weights = [one for name, one in streamed.named_parameters() if name.endswith(tuple(site.weights))]
    assert len([one for one in weights if isinstance(one, AbsentWeight)]) == 3 * len(set(site.weights))
    for change in (streamed.half, streamed.get_submodule(_ffn_module(streamed)).double):
        with pytest.raises(AbsentWeightError, match="cannot be converted"):
            change()
    assert (streamed(IDS).logits - dense(IDS).logits).abs().max() < TOLERANCE


def _ffn_module(model: Any) -> str:
    """The path of the first module with absent weights."""
    path: str = next(name for name, one in model.named_parameters() if isinstance(one, AbsentWeight))
    return path.rpartition(".")[0]


@pytest.mark.parametrize("case", ["gpt2", "phi3", "bloom", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(case: str, dtype: str, tmp_path: Path) -> None:
    dense = dense_model(case, dtype)
    with torch.no_grad():
        made = streamed_model(dense, tmp_path)(IDS).logits
        assert made.dtype == getattr(torch, dtype)
        expected = dense.float()(IDS).logits
    assert (made.float() - expected).abs().mean() < 0.03 * expected.abs().mean()


@pytest.mark.parametrize("case", ["falcon", "phi3", "mpt", "gpt_oss"])
def test_bits_of_a_row_do_not_depend_on_chunks_or_other_rows(case: str, tmp_path: Path) -> None:
    dense = dense_model(case, "bfloat16")
    with torch.no_grad():
        whole = streamed_model(dense, tmp_path / "whole", (1000,))(IDS).logits
        single = streamed_model(dense, tmp_path / "single", (1, 7))
        assert torch.equal(single(IDS[1:]).logits[0], whole[1])


def test_modules_keep_class_and_attributes(tmp_path: Path) -> None:
    dense = dense_model("phi3")
    streamed = streamed_model(dense, tmp_path)
    old, new = dense.model.layers[1].mlp, streamed.model.layers[1].mlp
    assert isinstance(new, type(old))
    assert type(new).__name__ == type(old).__name__
    assert (new.config.hidden_size, new.down_proj.in_features) == (32, 48)
    assert [name for name, _ in new.named_children()] == [name for name, _ in old.named_children()]
    assert [module.streamed.layer for module in streamed_ffns(streamed)] == [0, 1, 2]


def test_layers_of_different_width(tmp_path: Path) -> None:
    dense = dense_model("opt")
    layer = dense.model.decoder.layers[1]
    layer.fc1, layer.fc2 = torch.nn.Linear(32, 80), torch.nn.Linear(80, 32)
    parts = cut(dense)
    assert [layer.neurons for layer in parts.record.layers] == [48, 80, 48]


# What a module does between its projections


class Changed:
    """A streamed model whose decoder layers do something else between the projections."""

    def __init__(self, case: str, folder: Path) -> None:
        self.model = streamed_model(dense_model(case), folder)
        self.first, self.last = {
            "bloom": ("transformer.h.1.mlp.dense_h_to_4h", "transformer.h.1.mlp.dense_4h_to_h"),
            "opt": ("model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2"),
        }[case]

    def called(self) -> None:
        with torch.no_grad():
            self.model(IDS)


def test_a_hook_that_changes_a_product_is_refused(tmp_path: Path) -> None:
    changed = Changed("bloom", tmp_path)
    activation = changed.model.transformer.h[1].mlp.gelu_impl
    for change in (
        lambda h: h * 0.5,
        lambda h: h + torch.ones(128),
        lambda h: h[..., :64],
        lambda h: torch.zeros(2, 14, 128),
    ):
        handle = activation.register_forward_hook(lambda module, given, h, change=change: change(h))
        with pytest.raises(AbsentWeightError, match=r"(between its projections|last projection is fixed)"):
            changed.called()
        handle.remove()
        changed.called()


def test_a_hook_that_reads_a_product_is_refused(tmp_path: Path) -> None:
    changed = Changed("bloom", tmp_path)
    activation = changed.model.transformer.h[1].mlp.gelu_impl
    for read in (lambda h: h.sum().item(), lambda h: h.numpy(), lambda h: bool((h > 0).any()), lambda h: h.tolist()):
        handle = activation.register_forward_hook(lambda module, given, h, read=read: read(h) and None)
        with pytest.raises(AbsentWeightError, match="cannot be read"):
            changed.called()
        handle.remove()
    shapes: list[Any] = []
    handle = activation.register_forward_hook(lambda module, given, h: shapes.append((h.shape, h.dtype, repr(h))))
    changed.called()
    assert shapes == [((2, 14, 128), torch.float32, "PendingProjection(shape=(2, 14, 128))")]
    handle.remove()


def test_a_class_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    dense = dense_model("opt")
    parts = cut(dense)
    parts.record.activation.function = "gelu"
    parts.save_files(tmp_path)
    streamed = build_model(
        parts.record, tmp_path, ArraySource(parts, [9]), parts.placements.__getitem__, Workers(1)
    ).model
    with (
        torch.no_grad(),
        pytest.raises(AbsentWeightError, match=r"layers\.0 does not compute gelu between its projections"),
    ):
        streamed(IDS)


@pytest.mark.parametrize("case", ["phi3", "gpt2"])
def test_a_module_that_computes_something_else_is_refused(case: str, tmp_path: Path) -> None:
    parts = cut(dense_model(case))
    parts.record.activation.function = "relu"
    parts.save_files(tmp_path)
    with pytest.raises(
        ModelError, match=r"of transformers .*: .*0\.mlp does not compute relu between its projections; use"
    ):
        build_model(parts.record, tmp_path, ArraySource(parts, [9]), parts.placements.__getitem__, Workers(1))


def test_a_module_that_scales_its_output_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Phi3MLP.forward
    monkeypatch.setattr(Phi3MLP, "forward", lambda self, x: 0.5 * forward(self, x))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp changes what its last projection returns; use the transf"):
        streamed_model(dense_model("phi3"), tmp_path)


def test_an_interrupted_call_leaves_nothing_behind(tmp_path: Path) -> None:
    changed = Changed("bloom", tmp_path)
    dense = dense_model("bloom")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = changed.model.transformer.h[1].mlp.gelu_impl.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        changed.called()
    handle.remove()
    with torch.no_grad():
        assert (changed.model(IDS).logits - dense(IDS).logits).abs().max() < TOLERANCE


def test_biases_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    parts = cut(dense_model("gpt2"))
    parts.record.layers[0].biases[0].first = 1
    parts.save_files(tmp_path)
    with pytest.raises(ModelError, match=r"c_fc\.bias of model 'tiny' does not hold up biases"):
        build_model(parts.record, tmp_path, ArraySource(parts, [9]), parts.placements.__getitem__, Workers(1))
    assert parts.record.layers[0].place == Layer.MODULE
