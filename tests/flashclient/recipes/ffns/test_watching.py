"""FFNs found by running tiny models: formula, parts, and place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from flashclient.recipes.ffns.mixtures import experts_site
from flashclient.recipes.ffns.site import Layer, Part, Rows, Site
from flashclient.recipes.ffns.tiny import model_class, tiny_model
from flashclient.recipes.ffns.watching import watch
from flashclient.torch_state import one_thread
from weightd_proto.weightd_pb2 import Activation

MODULE, PARTS, EXPERTS = Layer.MODULE, Layer.PARTS, Layer.EXPERTS


@one_thread()
def sites(kind: str, layers: int = 4, **changes: Any) -> list[Site]:
    return watch(tiny_model(*model_class(AutoConfig.for_model(kind, **changes)), layers)).sites


def parts(*named: tuple[str, Rows] | tuple[str, Rows, str]) -> tuple[Part, ...]:
    def part(name: str, rows: Rows, bias: str | None = None) -> Part:
        return Part(name, rows, None if bias is None else replace(rows, parameter=bias, columns=False))

    return tuple(part(*of) for of in named)


GATED = parts(
    ("gate", Rows("gate_proj.weight")),
    ("up", Rows("up_proj.weight")),
    ("down", Rows("down_proj.weight", columns=True)),
)
FUSED = parts(
    ("gate", Rows("gate_up_proj.weight", block=0, blocks=2)),
    ("up", Rows("gate_up_proj.weight", block=1, blocks=2)),
    ("down", Rows("down_proj.weight", columns=True)),
)


@pytest.mark.parametrize(
    ("kind", "changes", "place", "function", "module", "expected"),
    [
        ("llama", {}, MODULE, "silu", "model.layers.0.mlp", GATED),
        ("llama", {"hidden_act": "relu"}, MODULE, "relu", "model.layers.0.mlp", GATED),
        ("llama", {"hidden_act": "gelu_new"}, MODULE, "gelu_tanh", "model.layers.0.mlp", GATED),
        ("llama", {"hidden_act": "gelu"}, MODULE, "gelu", "model.layers.0.mlp", GATED),
        ("llama", {"hidden_act": "quick_gelu"}, MODULE, "swish", "model.layers.0.mlp", GATED),
        ("qwen2", {}, MODULE, "silu", "model.layers.0.mlp", GATED),
        ("gemma2", {}, MODULE, "gelu_tanh", "model.layers.0.mlp", GATED),
        ("phi3", {}, MODULE, "silu", "model.layers.0.mlp", FUSED),
        (
            "falcon",
            {},
            MODULE,
            "gelu",
            "transformer.h.0.mlp",
            parts(("up", Rows("dense_h_to_4h.weight")), ("down", Rows("dense_4h_to_h.weight", columns=True))),
        ),
        (
            "persimmon",
            {},
            MODULE,
            "relu_squared",
            "model.layers.0.mlp",
            parts(
                ("up", Rows("dense_h_to_4h.weight"), "dense_h_to_4h.bias"),
                ("down", Rows("dense_4h_to_h.weight", columns=True), "dense_4h_to_h.bias"),
            ),
        ),
        (  # Conv1D: its matrices are transposed
            "gpt2",
            {},
            MODULE,
            "gelu_tanh",
            "transformer.h.0.mlp",
            parts(
                ("up", Rows("c_fc.weight", columns=True), "c_fc.bias"), ("down", Rows("c_proj.weight"), "c_proj.bias")
            ),
        ),
        (  # the decoder layer calls the projections
            "opt",
            {},
            PARTS,
            "relu",
            "model.decoder.layers.0",
            parts(("up", Rows("fc1.weight"), "fc1.bias"), ("down", Rows("fc2.weight", columns=True), "fc2.bias")),
        ),
        (  # the residual is added in the module
            "bloom",
            {"n_layer": 4},
            PARTS,
            "gelu_tanh",
            "transformer.h.0.mlp",
            parts(
                ("up", Rows("dense_h_to_4h.weight"), "dense_h_to_4h.bias"),
                ("down", Rows("dense_4h_to_h.weight", columns=True), "dense_4h_to_h.bias"),
            ),
        ),
        (
            "bert",
            {},
            PARTS,
            "gelu",
            "bert.encoder.layer.0",
            parts(
                ("up", Rows("intermediate.dense.weight"), "intermediate.dense.bias"),
                ("down", Rows("output.dense.weight", columns=True), "output.dense.bias"),
            ),
        ),
    ],
)
def test_an_ffn_is_found(
    kind: str, changes: dict[str, Any], place: Layer.Place, function: str, module: str, expected: tuple[Part, ...]
) -> None:
    found = sites(kind, **changes)
    assert len(found) == 4
    first = found[0]
    assert (first.module, first.place, first.activation.function) == (module, place, function)
    assert first.parts == expected
    assert (first.hidden_size, first.experts) == (64, 0)


def test_experts_of_gpt_oss() -> None:
    """Transposed, interleaved, with biases, a limit on both products and an offset."""
    first, *others = sites("gpt_oss")
    assert len(others) == 3
    assert (first.module, first.place, first.experts) == ("model.layers.0.mlp.experts", EXPERTS, 8)
    assert first.activation == Activation(function="swish", parameter=1.702, gate_max=7, up_limit=7, up_offset=1)
    assert first.parts == parts(
        ("gate", Rows("gate_up_proj", True, 0, 2, True, 8), "gate_up_proj_bias"),
        ("up", Rows("gate_up_proj", True, 1, 2, True, 8), "gate_up_proj_bias"),
        ("down", Rows("down_proj", False, 0, 1, False, 8), "down_proj_bias"),
    )


def test_first_dense_layers_experts_and_shared_experts() -> None:
    found = sites("deepseek_v3", 5)
    assert [(site.module.removeprefix("model.layers."), site.place) for site in found] == [
        *((f"{layer}.mlp", MODULE) for layer in range(3)),
        ("3.mlp.experts", EXPERTS),
        ("3.mlp.shared_experts", MODULE),
        ("4.mlp.experts", EXPERTS),
        ("4.mlp.shared_experts", MODULE),
    ]
    assert {site.activation.function for site in found} == {"silu"}


def test_experts_without_gate() -> None:
    first = sites("nemotron_h")[0]
    assert (first.place, first.activation.function) == (EXPERTS, "relu_squared")
    assert [part.rows for part in first.parts] == [Rows("up_proj", experts=8), Rows("down_proj", True, experts=8)]


def test_gates_that_are_sparse_by_statistics_are_no_formula() -> None:
    found = sites("gemma3n_text", 12)
    assert [site.module for site in found] == ["model.layers.10.mlp", "model.layers.11.mlp"]


@pytest.mark.parametrize("kind", ["mamba", "bitnet"])
def test_what_is_no_ffn_of_the_kernels_is_not_found(kind: str) -> None:
    """bitnet: a norm stands before the last projection."""
    assert sites(kind) == []


class Experts(nn.Module):
    """Mixes as transformers' experts do, with up first; `extra` is added to the output."""

    def __init__(self, extra: float = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.both = nn.Parameter(torch.randn(3, 10, 16, generator=generator) / 4, requires_grad=False)
        self.last = nn.Parameter(torch.randn(3, 16, 5, generator=generator) / 2, requires_grad=False)
        self.extra = extra

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        up, gate = torch.einsum("tkah,th->tka", self.both[chosen], x).chunk(2, dim=-1)
        made = nn.functional.silu(gate) * up
        return torch.einsum("tka,tkha,tk->th", made, self.last[chosen], weights) + self.extra


def test_experts_with_other_names_and_up_first() -> None:
    module = Experts()
    before = module.last.clone()
    site = experts_site("some.experts", module, 16)
    assert site is not None
    assert (site.neurons, site.experts, site.activation.function) == (5, 3, "silu")
    assert [part.rows.block for part in site.parts[:2]] == [1, 0]
    assert torch.equal(module.last, before)


def test_experts_that_do_more_are_refused() -> None:
    assert experts_site("some.experts", Experts(extra=0.1), 16) is None
