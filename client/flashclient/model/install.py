"""Puts streamed FFNs in the place of a model's own, as the record says (weightd.v1.Layer): no names of classes.

MODULE: the module computes the streamed FFN instead of its forward. PARTS: see parts.py. EXPERTS: see
streamed_experts.py. Modules stay the same objects with the same attributes, children and names. Only the weights that
the bundles hold are replaced, by absent ones, and so are the biases, which the kernels add.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from math import prod
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, activations

from flashclient.errors import ModelError
from flashclient.model.absent_weights import (
    AbsentProjection,
    HoldsAbsentWeights,
    NeverCalled,
    become,
    fix,
    make_absent,
)
from flashclient.model.activations import activation_of
from flashclient.model.experts_ffn import ExpertsFFN
from flashclient.model.ffn import Biases, LayerFFN, ModelFFN, StreamedFFN, streamed_ffn
from flashclient.model.parts import (
    BetweenProjections,
    FirstProjection,
    LastProjection,
    OtherActivationError,
    PartsOfFFN,
)
from flashclient.model.streamed_experts import LayerExperts, StreamedExperts
from flashclient.torch_state import eager
from weightd_proto import weightd_pb2

Placement = Callable[[int], NDArray[np.uint32]]  # layer -> the neuron at each position
ACTIVATION_PACKAGES = (nn.modules.activation.__name__, activations.__name__)


def install_ffns(
    model: PreTrainedModel,
    record: weightd_pb2.Model,
    placement: Placement,
    tensors: dict[str, Tensor],
    ffn: ModelFFN,
) -> None:
    """Installs every layer of `record`, and removes the biases from `tensors`.

    Args:
        ffn: an ExpertsFFN for a model with experts.

    Raises:
        ModelError: the model has no such modules or parameters, or they have other shapes.
    """
    used: set[str] = set()
    learned = {f"{layer.module}.{name}" for layer in record.layers for name in record.activation.learned}
    # Before activations are tried.
    model.load_state_dict({name: tensors[name] for name in learned}, strict=False, assign=True)
    for index, layer in enumerate(record.layers):
        installing = _Installing(model, record, layer)
        biases = biases_of(record, layer, tensors, lambda index=index: placement(index))  # type: ignore[misc]
        output_bias = tensors[layer.output_bias].float() if layer.output_bias else None
        if layer.place == weightd_pb2.Layer.EXPERTS:
            assert isinstance(ffn, ExpertsFFN)
            installing.install_experts(LayerExperts(ffn, index, layer.experts, biases, output_bias))
        else:
            installing.install(LayerFFN(ffn, index, biases, output_bias))
        used |= {bias.tensor for bias in layer.biases} | {layer.output_bias}
    for name in used & tensors.keys():
        del tensors[name]


def biases_of(
    record: weightd_pb2.Model,
    layer: weightd_pb2.Layer,
    tensors: dict[str, Tensor],
    placement: Callable[[], NDArray[np.uint32]],
) -> Biases:
    """The biases of a layer's neurons: [parts but down, neurons] by position; None where it has none.

    Raises:
        ModelError: a resident tensor is missing, or has not enough elements.
    """
    if not layer.biases:
        return None
    rows = [part.name for part in record.bundle.parts[:-1]]
    by_neuron = np.zeros((len(rows), layer.neurons), np.float32)
    for bias in layer.biases:
        experts = max(1, layer.experts)
        of_experts = tensors[bias.tensor].float().reshape(experts, -1)[:, bias.first :: max(1, bias.step)]
        taken = of_experts[:, : layer.neurons // experts].reshape(-1).numpy()
        if bias.part not in rows or len(taken) != layer.neurons:
            raise ModelError(f"tensor {bias.tensor} of model '{record.name}' does not hold {bias.part} biases")
        by_neuron[rows.index(bias.part)] = taken
    return np.ascontiguousarray(by_neuron[:, placement()])


def streamed_ffns(model: nn.Module) -> list[StreamedFFN]:
    """The modules that compute the FFNs of `model`, in the order of the record's layers."""
    found = [module for module in model.modules() if isinstance(module, StreamedFFN)]
    return sorted(found, key=lambda module: module.streamed.layer)


@cache
def _untraced(kind: Any) -> Any:
    """A subclass whose forward torch.compile() does not trace. It has the name of `kind`."""
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "forward": eager(kind.forward)})


class _Installing:
    """The installation of one layer."""

    def __init__(self, model: PreTrainedModel, record: weightd_pb2.Model, layer: weightd_pb2.Layer) -> None:
        self._model = model
        self._record = record
        self._layer = layer
        self._module = self._found(layer.module)
        parts = [part.name for part in record.bundle.parts]
        self._parts: dict[str, list[str]] = {}  # by parameter, below the module
        for name, part in zip(layer.weights, parts, strict=False):
            self._parts.setdefault(name, []).append(part)
        if len(layer.weights) != len(parts):
            raise ModelError(f"model '{record.name}' names {len(layer.weights)} weights for {len(parts)} parts")
        for name, held in self._parts.items():
            self._check_shape(name, len(held))

    def install(self, streamed: LayerFFN) -> None:
        place = weightd_pb2.Layer.Place
        if self._layer.place == place.MODULE:
            self._install_module(streamed)
        elif self._layer.place == place.PARTS:
            self._install_parts(streamed)
        else:
            raise ModelError(f"no way to install {self._layer.module} of '{self._record.name}'; upgrade flashclient")

    def _install_module(self, streamed: LayerFFN) -> None:
        projections: dict[str, type[HoldsAbsentWeights]] = {owner: AbsentProjection for owner, _ in self._holders()}
        self._make_absent(projections)
        form = None if self._record.activation.instead else self._check_forward()
        for path, part in list(self._module.named_modules()):
            if path and path not in projections and next(part.children(), None) is None:
                self._replace(path, NeverCalled)
        become(self._module, StreamedFFN)
        self._module.streamed = streamed  # type: ignore[assignment]
        self._module.__dict__["fused_form"] = form

    def _check_forward(self) -> int | None:
        """Runs the module's own forward once, to see that it computes the record's activation in this transformers.

        Returns:
            The one of FUSED_FORMS that a fused matrix has; None where that was not seen.

        Raises:
            ModelError: it does not. A forward that does more than can be seen is left to the proof of the import.
        """
        x = torch.zeros(1, 1, self._record.bundle.hidden_size, dtype=torch.float32, device="cpu")
        y = torch.arange(x.numel(), dtype=torch.float32, device="cpu").view(x.shape)
        site = self._parts_of_ffn()
        *firsts, (last, _) = ((self._module.get_submodule(owner), held) for owner, held in self._holders())
        for projection, held in firsts:
            projection.__dict__["forward"] = partial(site.begin, tuple(held), ffn=lambda _: y)
        last.__dict__["forward"] = site.finish
        try:
            made = self._module(x)
        except OtherActivationError as error:
            raise self._unlike(str(error).partition(";")[0]) from error
        except Exception:  # whatever a module raises that was not made for this
            return None
        finally:
            for projection in (last, *(projection for projection, _ in firsts)):
                del projection.__dict__["forward"]
        if not isinstance(made, Tensor) or not torch.equal(made, y):
            raise self._unlike(f"{self._layer.module} changes what its last projection returns")
        return site.form

    def _install_parts(self, streamed: LayerFFN) -> None:
        layer, site = self._layer, self._parts_of_ffn()
        *firsts, (last, _) = self._holders()
        kinds: dict[str, type[HoldsAbsentWeights]] = {path: FirstProjection for path, _ in firsts}
        self._make_absent(kinds | {last: LastProjection})
        ffn = streamed_ffn(streamed)
        for path, held in firsts:
            projection = self._module.get_submodule(path)
            projection.__dict__.update(site=site, parts=tuple(held))
            projection.add_module("ffn", ffn)
        self._module.get_submodule(last).__dict__["site"] = site
        for path in self._activations():
            self._replace(path, BetweenProjections)
        for part in self._module.modules():
            if isinstance(part, FirstProjection | LastProjection | BetweenProjections):
                part.__dict__["hookable"] = f"{layer.module}.{firsts[0][0]}.ffn"
        # torch.compile() would trace what becomes of pending projections.
        kind: Any = type(self._module)  # hashable, which mypy does not see
        self._module.__class__ = _untraced(kind)

    def install_experts(self, streamed: LayerExperts) -> None:
        self._make_absent({"": StreamedExperts})
        for path, part in list(self._module.named_modules()):
            if path and next(part.children(), None) is None:
                self._replace(path, NeverCalled)
        self._module.__dict__["streamed"] = streamed
        parent = self._found(self._layer.module.rpartition(".")[0])
        beside = [module for module in parent.children() if module is not self._module]
        streamed.ffn.look_ahead.watch(streamed.layer, self._module, beside)

    def _parts_of_ffn(self) -> PartsOfFFN:
        gated = len(self._record.bundle.parts) == 3
        activation = activation_of(self._record, self._layer)
        return PartsOfFFN(self._layer.module, self._layer.neurons, activation, gated)

    def _holders(self) -> list[tuple[str, list[str]]]:
        """The projections, below the module, and the parts that each holds."""
        return [(name.rpartition(".")[0], held) for name, held in self._parts.items()]

    def _activations(self) -> list[str]:
        """The activations beside the projections, or above them."""
        parents = {path[:end] for path, _ in self._holders() for end in _ends_of_parents(path)}
        return [
            path
            for path, part in self._module.named_modules()
            if type(part).__module__ in ACTIVATION_PACKAGES
            and path.rpartition(".")[0] in parents
            and next(part.parameters(), None) is None
        ]

    def _make_absent(self, kinds: dict[str, type[HoldsAbsentWeights]]) -> None:
        """Makes the parameters that the bundles hold absent, and the biases of the same modules."""
        prefix = f"{self._layer.module}."
        biases = [*(bias.tensor for bias in self._layer.biases), self._layer.output_bias]
        names = list(self._parts) + [name.removeprefix(prefix) for name in biases if name.startswith(prefix)]
        for owner, kind in kinds.items():
            own = dict.fromkeys(attribute for path, _, attribute in map(_split, names) if path == owner)
            module = self._module.get_submodule(owner)
            held = [name for name in own if module._parameters.get(name) is not None]
            make_absent(module, f"{prefix}{owner}".rstrip("."), held, kind)
            self._fix(owner)

    def _replace(self, path: str, kind: type[nn.Module]) -> None:
        """Puts a copy in the place of a part that has no parameters: transformers shares some between models."""
        parent, _, name = path.rpartition(".")
        part = copy.copy(self._module.get_submodule(path))
        self._module.get_submodule(parent)._modules[name] = part
        part.__dict__["path"] = f"{self._layer.module}.{path}"
        become(part, kind)
        self._fix(path)

    def _fix(self, path: str) -> None:
        if path:
            parent, _, name = path.rpartition(".")
            fix(self._module.get_submodule(parent), (name,))

    def _found(self, path: str) -> nn.Module:
        try:
            return self._model.get_submodule(path)
        except AttributeError as error:
            raise self._unlike(f"there is no module {path}") from error

    def _check_shape(self, name: str, parts: int) -> None:
        layer, hidden = self._layer, self._record.bundle.hidden_size
        owner, _, attribute = _split(f"{layer.module}.{name}")
        parameter = self._found(owner)._parameters.get(attribute)
        if parameter is None:
            raise self._unlike(f"{owner} has no parameter {attribute}")
        experts = [layer.experts] if layer.experts else []
        expected = [*experts, layer.neurons // max(1, layer.experts) * parts, hidden]
        if Counter(parameter.shape) != Counter(expected) or parameter.numel() != prod(expected):
            raise self._unlike(f"{owner}.{attribute} has shape {tuple(parameter.shape)}, the store {tuple(expected)}")

    def _unlike(self, what: str) -> ModelError:
        here, then = transformers.__version__, getattr(self._model.config, "transformers_version", None)
        return ModelError(
            f"model '{self._record.name}' does not fit {type(self._model).__name__} of transformers {here}: {what}; "
            f"use the transformers that it was imported with{f' ({then})' if then else ''}, or import it again"
        )


def _split(name: str) -> tuple[str, str, str]:
    return name.rpartition(".")


def _ends_of_parents(path: str) -> list[int]:
    return [0, *(index for index, letter in enumerate(path) if letter == ".")]
