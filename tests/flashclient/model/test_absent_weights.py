"""FFN weights are not in the process: an operation works without them, or its error names an alternative."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_config, make_model
from cut_model import ArraySource, cut
from torch import nn
from torch.nn.utils import parametrize, prune

from flashclient._native import Workers
from flashclient.errors import AbsentWeightError
from flashclient.model.build import build_model

IDS = torch.arange(3, 23).unsqueeze(0)
FAMILIES = ("llama", "opt", "gemma3")
Model = Any


class Pair:
    """A dense model and the same model streamed."""

    def __init__(self, family: str, folder: Path) -> None:
        self.dense: Model = make_model(make_config(family))
        self.layers = "model.decoder.layers" if family == "opt" else "model.layers"
        self.first, self.last = ("fc1", "fc2") if family == "opt" else ("mlp.gate_proj", "mlp.down_proj")
        self._parts, self._folder = cut(self.dense), folder
        folder.mkdir(exist_ok=True)
        self._parts.save_files(folder)
        self.streamed = self.another()

    def another(self) -> Model:
        parts = self._parts
        source = ArraySource(parts, [61, 5])
        return build_model(parts.record, self._folder, source, lambda layer: parts.placements[layer], Workers(2)).model

    def projection(self, model: Model, name: str) -> Any:
        return model.get_submodule(f"{self.layers}.0.{name}")

    def activation(self, model: Model) -> Any:
        return model.get_submodule(f"{self.layers}.0.{'mlp.act_fn' if 'mlp' in self.first else 'activation_fn'}")

    def same(self, model: Model | None = None, dense: Model | None = None) -> bool:
        """Whether both models make the same logits; by default those of the pair."""
        with torch.no_grad():
            made = (self.streamed if model is None else model)(IDS).logits
            expected = (self.dense if dense is None else dense)(IDS).logits
            return made.shape == expected.shape and torch.allclose(made, expected, atol=1e-3)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(request.param, tmp_path_factory.mktemp(request.param))
    yield pair
    assert pair.same(), "a refusal left something behind"


def test_what_counts_and_lists_them_is_right(pair: Pair) -> None:
    def facts(model: Model, list_them: str) -> dict[str, Any]:
        return {name: (one.shape, one.dtype) for name, one in dict(getattr(model, list_them)()).items()}

    for list_them in ("named_parameters", "state_dict"):
        assert facts(pair.streamed, list_them) == facts(pair.dense, list_them)
    assert pair.streamed.num_parameters() == pair.dense.num_parameters()
    assert "AbsentWeight" in repr(pair.projection(pair.streamed, pair.first).weight)
    assert pair.streamed.dtype == torch.float32
    assert pair.streamed.device.type == "cpu"


USES: dict[str, Callable[[Pair, Model, Any], Any]] = {
    "save_pretrained": lambda pair, model, one: model.save_pretrained("/nowhere"),
    "save_pretrained of the inner model": lambda pair, model, one: model.model.save_pretrained("/nowhere"),
    "push_to_hub": lambda pair, model, one: model.push_to_hub("somebody/something"),
    "torch.save of the model": lambda pair, model, one: torch.save(model, io.BytesIO()),
    "torch.save of a state_dict": lambda pair, model, one: torch.save(model.state_dict(), io.BytesIO()),
    "pickle": lambda pair, model, one: pickle.dumps(model),
    "deepcopy": lambda pair, model, one: copy.deepcopy(model),
    "deepcopy of a layer": lambda pair, model, one: copy.deepcopy(model.get_submodule(f"{pair.layers}.0")),
    "copy": lambda pair, model, one: copy.copy(model),
    "load_state_dict": lambda pair, model, one: model.load_state_dict(pair.dense.state_dict()),
    "load_state_dict, assign": lambda pair, model, one: model.load_state_dict(pair.dense.state_dict(), assign=True),
    "half": lambda pair, model, one: model.half(),
    "bfloat16 of the inner model": lambda pair, model, one: model.model.bfloat16(),
    "to a dtype": lambda pair, model, one: model.to(torch.bfloat16),
    "to a device": lambda pair, model, one: model.to("meta"),
    "to_empty": lambda pair, model, one: model.to_empty(device="cpu"),
    "share_memory": lambda pair, model, one: model.share_memory(),
    "requires_grad": lambda pair, model, one: model.requires_grad_(True),
    "read a weight": lambda pair, model, one: one.weight[0],
    "add to a weight": lambda pair, model, one: one.weight.data.add_(1),
    "write into a weight": lambda pair, model, one: one.weight.__setitem__(0, 1.0),
    "copy into a weight": lambda pair, model, one: one.weight.copy_(torch.ones(one.weight.shape)),
    "put data into a weight": lambda pair, model, one: setattr(one.weight, "data", torch.ones(2, 2)),
    "put a weight": lambda pair, model, one: setattr(one, "weight", nn.Parameter(torch.ones(one.weight.shape))),
    "put a projection": lambda pair, model, one: _put(pair, model, nn.Linear(4, 4)),
    "a projection alone": lambda pair, model, one: one(torch.ones(1, one.in_features)),
    "a hook": lambda pair, model, one: one.register_forward_hook(print),
    "a hook on the activation": lambda pair, model, one: pair.activation(model).register_forward_hook(print),
    "a pre-hook on it": lambda pair, model, one: pair.activation(model).register_forward_pre_hook(print),
    "another forward": lambda pair, model, one: setattr(one, "forward", torch.relu),
    "another forward of the activation": lambda pair, model, one: setattr(
        pair.activation(model), "forward", torch.relu
    ),
    "the activation alone": lambda pair, model, one: pair.activation(model)(torch.ones(4)),
    "quantisation by torch": lambda pair, model, one: setattr(one, "qconfig", None),  # it does this first
    "initialise": lambda pair, model, one: nn.init.normal_(one.weight),
    "reset": lambda pair, model, one: one.reset_parameters(),
    "prune": lambda pair, model, one: prune.l1_unstructured(one, "weight", 0.5),  # type: ignore[no-untyped-call]
    "parametrize": lambda pair, model, one: parametrize.register_parametrization(one, "weight", nn.Identity()),
    "numpy": lambda pair, model, one: one.weight.numpy(),
    "a norm": lambda pair, model, one: torch.linalg.norm(one.weight),
    "a product": lambda pair, model, one: torch.ones(1, one.weight.shape[1]) @ one.weight.T,
}


def _put(pair: Pair, model: Model, module: nn.Module) -> None:
    parent, _, name = f"{pair.layers}.0.{pair.last}".rpartition(".")
    setattr(model.get_submodule(parent), name, module)


@pytest.mark.parametrize("use", USES)
def test_what_needs_them_is_refused(pair: Pair, use: str) -> None:
    with pytest.raises(AbsentWeightError, match="the weights stay with weightd; "):
        USES[use](pair, pair.streamed, pair.projection(pair.streamed, pair.last))


def test_the_refusal_of_a_hook_names_a_module_that_takes_it(pair: Pair) -> None:
    with pytest.raises(AbsentWeightError, match=r"hook (.*), which computes all of it") as refused:
        pair.projection(pair.streamed, pair.first).register_forward_pre_hook(print)
    named = refused.value.args[0].split("hook ")[-1].split(",")[0]
    path = {"the module of the FFN": f"{pair.layers}.0.mlp"}.get(named, named)
    seen: list[torch.Tensor] = []
    handle = pair.streamed.get_submodule(path).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    pair.streamed(IDS)
    handle.remove()
    assert [one.numel() for one in seen] == [IDS.numel() * pair.streamed.config.hidden_size]


def test_conversions_to_what_the_model_is_do_nothing(pair: Pair) -> None:
    for converted in (pair.streamed.float(), pair.streamed.to("cpu"), pair.streamed.to(torch.float32).cpu()):
        assert converted is pair.streamed
    assert pair.streamed.requires_grad_(False).eval() is pair.streamed


def test_no_gradient_flows_through_an_ffn(pair: Pair) -> None:
    for training in (True, False):
        pair.streamed.train(training)
        embedded = pair.streamed.get_input_embeddings()(IDS).detach().requires_grad_(True)
        loss = pair.streamed(inputs_embeds=embedded).logits.sum()
        with pytest.raises(AbsentWeightError, match="no gradient flows"):
            loss.backward()


def test_other_weights_may_be_changed_as_in_transformers(pair: Pair) -> None:
    streamed, dense = pair.another(), copy.deepcopy(pair.dense)
    model: Model
    for model in (streamed, dense):
        attention = model.get_submodule(f"{pair.layers}.1.self_attn")
        with torch.no_grad():
            attention.q_proj.weight *= 1.5
            attention.k_proj.weight.data[0] = 0.25
            attention.v_proj.weight = nn.Parameter(attention.v_proj.weight.flip(0).clone())
        norm = next(one for name, one in model.named_parameters() if "norm" in name)
        norm.data += 0.5
        model.resize_token_embeddings(330, mean_resizing=False)
        model.get_input_embeddings().weight.data[320:] = 0.5
        model.get_output_embeddings().weight.data[320:] = 0.5
    assert pair.same(streamed, dense)
    assert not pair.same(streamed)
    two = copy.deepcopy(streamed.get_submodule(f"{pair.layers}.1.self_attn.q_proj"))
    assert torch.equal(two.weight, dense.get_submodule(f"{pair.layers}.1.self_attn.q_proj").weight)


def test_a_whole_ffn_may_be_replaced(tmp_path: Path) -> None:
    pair = Pair("llama", tmp_path)
    pair.streamed.model.layers[1].mlp = copy.deepcopy(pair.dense.model.layers[1].mlp)
    assert pair.same()


def test_compiled(tmp_path: Path) -> None:
    for family in ("llama", "opt"):
        pair = Pair(family, tmp_path / family)
        pair.streamed.get_submodule(f"{pair.layers}.0").compile(backend="eager")
        assert pair.same()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft's own
def test_peft(pair: Pair, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    q_proj, ours = "q_proj", pair.last.rpartition(".")[2]
    for names, works in (([q_proj, "v_proj"], True), ([q_proj, ours], False), ([ours], False)):
        folder = tmp_path / "-".join(names)
        config = peft.LoraConfig(target_modules=names, r=2, init_lora_weights=False)
        dense = peft.get_peft_model(copy.deepcopy(pair.dense), config).eval()
        dense.save_pretrained(folder)
        for load in (peft.PeftModel.from_pretrained, type(pair.dense).load_adapter):
            streamed = pair.another()
            if works:
                loaded = load(streamed, str(folder))
                adapted = loaded if isinstance(loaded, nn.Module) else streamed
                assert pair.same(adapted, dense)
                assert not pair.same(adapted)
                continue
            with pytest.raises(AbsentWeightError, match="adapt only the attention"):
                load(streamed, str(folder))
