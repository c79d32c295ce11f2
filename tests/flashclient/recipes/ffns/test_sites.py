"""Sites of full-size models, which take no memory."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from flashclient.recipes.ffns.site import Layer
from flashclient.recipes.ffns.sites import Streamed, carried, layers_needed, streamed, weightless
from flashclient.recipes.ffns.tiny import model_class, tiny_model
from flashclient.recipes.ffns.watching import watch
from flashclient.torch_state import one_thread


@one_thread()
def split(kind: str, **changes: Any) -> Streamed:
    of_class, config = model_class(AutoConfig.for_model(kind, **changes))
    full = weightless(of_class, config)
    tiny = tiny_model(of_class, config, layers_needed(full))
    outline = weightless(of_class, tiny.config)
    found = watch(tiny)
    return streamed(full, carried(outline, found.sites, found.called, full))


def test_a_dense_model() -> None:
    of = split("llama")
    assert [site.module for site in of.sites] == [f"model.layers.{layer}.mlp" for layer in range(32)]
    assert {(site.neurons, site.hidden_size, site.experts) for site in of.sites} == {(11008, 4096, 0)}
    assert of.resident_share == pytest.approx(0.358, abs=1e-3)


def test_a_mixture_of_671_billion_parameters() -> None:
    of = split("deepseek_v3")
    layers = [site.module.removeprefix("model.layers.") for site in of.sites]
    assert layers[:6] == ["0.mlp", "1.mlp", "2.mlp", "3.mlp.experts", "3.mlp.shared_experts", "4.mlp.experts"]
    assert len(layers) == 3 + 2 * 58
    dense, mixture, shared = (of.sites[index] for index in (0, 3, 4))
    assert [(site.neurons, site.experts) for site in (dense, mixture, shared)] == [(18432, 0), (2048, 256), (2048, 0)]
    assert of.resident_share < 0.03


def test_fused_rows_have_the_sizes_of_the_full_model() -> None:
    gate, up, _ = split("phi3").sites[0].parts
    assert (gate.rows.first_and_step(8192), up.rows.first_and_step(8192)) == ((0, 1), (8192, 1))
    gate, up, _ = split("gpt_oss").sites[0].parts
    assert (gate.rows.first_and_step(2880), up.rows.first_and_step(2880)) == ((0, 2), (1, 2))
    assert gate.rows.experts == 128


def test_layers_that_compute_something_else_stay_resident() -> None:
    """Gemma 3n's modules of one class differ by a number: the first ten layers are sparse."""
    of = split("gemma3n_text")
    assert [site.module.rpartition("layers.")[2] for site in of.sites] == [f"{layer}.mlp" for layer in range(10, 35)]
    modules = [f"model.layers.{layer}.mlp" for layer in range(10)]
    assert list(of.unrecognised) == modules
    assert list(of.notes()) == [
        f"FFNs that compute something else than the others stay in memory: {', '.join(modules[:3])} and 7 more",
        "66% of the weights stay in memory",
    ]


def test_sites_of_another_layout_stay_resident() -> None:
    """The norms of this model have small FFNs of their own, without a gate."""
    of = split("axk2")
    assert {site.hidden_size for site in of.sites} == {2048}
    assert all(len(site.parts) == 3 for site in of.sites)
    assert of.others
    assert all("norm" in site.module for site in of.others)
    assert next(of.notes()).startswith("FFNs of another layout or activation than most stay in memory: model.layers.0.")


def test_a_model_without_ffns() -> None:
    of = split("mamba")
    assert (of.sites, of.others, of.unrecognised, of.resident_share) == ((), (), (), 1.0)


def test_a_module_that_changes_when_it_runs() -> None:
    """BigBird's attention becomes another one for short inputs."""
    of = split("big_bird")
    assert len(of.sites) == 12
    assert {site.place for site in of.sites} == {Layer.PARTS}
