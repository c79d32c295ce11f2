"""Which models may compute their native layers together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native_models import FUSED, PROMPTS, WORKERS, make
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from flashclient.kernels.decoder_layer import use_native_layers
from flashclient.kernels.growing_cache import GrowingCache
from flashclient.kernels.layer_runs import NativeStack
from flashclient.model.ffn import StreamedFFN


def stacks(model: Any) -> list[str]:
    return [type(one).__name__ for one in model.modules() if isinstance(one, NativeStack)]


class Loop(LlamaModel):  # type: ignore[no-untyped-call]
    """Calls its layers in another way, which a test chooses."""

    def forward(self, inputs_embeds: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        positions = torch.arange(inputs_embeds.shape[1]).unsqueeze(0)
        angles = self.rotary_emb(inputs_embeds, position_ids=positions)
        x = self.loop(inputs_embeds, position_embeddings=angles, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))

    def loop(self, x: Tensor, **given: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, **given)
        return x


class Scaled(Loop):  # type: ignore[no-untyped-call]
    def loop(self, x: Tensor, **given: Any) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x if number == 0 else x * 1, **given)
        return x


class Backwards(Loop):  # type: ignore[no-untyped-call]
    def loop(self, x: Tensor, **given: Any) -> Tensor:
        for number in reversed(range(len(self.layers))):
            x = self.layers[number](x, **given)
        return x


class Parallel(Loop):  # type: ignore[no-untyped-call]
    def loop(self, x: Tensor, **given: Any) -> Tensor:
        for layer in self.layers:
            y: Tensor = layer(x, **given)
        return y


class Looking(Loop):  # type: ignore[no-untyped-call]
    def loop(self, x: Tensor, **given: Any) -> Tensor:
        for layer in self.layers[:]:
            x = layer(x, **given)
            if bool(x.isnan().any()):
                break
        return x


@pytest.mark.parametrize("kind", [kind for kind in FUSED if kind not in ("olmo", "opt", "phi")])
def test_models_that_only_call_their_layers_are_found(kind: str) -> None:
    model: Any = make(kind)[0]
    assert use_native_layers(model, WORKERS, StreamedFFN) == 2
    assert stacks(model) == [type(model.model).__name__]
    layers = model.model.layers
    assert type(layers[:1]).__name__ == "ModuleList"
    assert list(layers) == [layers[0], layers[1]]
    assert model(PROMPTS, past_key_values=GrowingCache(model.config)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "found"), [(Loop, True), (Scaled, False), (Backwards, False), (Parallel, False), (Looking, False)]
)
def test_models_that_use_what_a_layer_returns_are_left_alone(kind: Any, found: bool) -> None:
    model: Any = make("llama")[0]
    model.model.__class__ = kind
    assert use_native_layers(model, WORKERS, StreamedFFN) == 2
    assert stacks(model) == ([kind.__name__] if found else [])
