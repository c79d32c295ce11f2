"""Finds the embeddings of a model that only look rows up, by running a tiny instance of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from flashclient.model.absent_weights import TELLING
from flashclient.recipes.ffns.sites import generic
from flashclient.recipes.ffns.watching import run
from flashclient.tensors.names import tied_pairs
from weightd_proto.tables import WEIGHT


def looked_up(tiny: PreTrainedModel) -> list[str]:
    """The modules of `tiny`, a model with weights, whose weight is used by torch's embedding() and by nothing else."""
    watched = _Uses({id(module.weight): name for name, module in _embeddings(tiny)})
    with watched:
        run(tiny)
    return sorted(watched.looked_up - watched.used)


def embeddings_like(names: Iterable[str], full: PreTrainedModel) -> list[str]:
    """The embeddings of `full` that are in the same places as those of its tiny instance, but in any layer.

    Without those whose weight is tied to another one: a head is needed as a whole.
    """
    known = {generic(name) for name in names}
    tied = {name for pair in tied_pairs(full).items() for name in pair}
    return [name for name, _ in _embeddings(full) if generic(name) in known and f"{name}.{WEIGHT}" not in tied]


def _embeddings(model: nn.Module) -> list[tuple[str, nn.Embedding]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]


class _Uses(TorchFunctionMode):
    """Notes which functions of torch are called with the weights of embeddings.

    Attributes:
        looked_up: those given to embedding().
        used: those given to another function that reads their values.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names = names
        self.looked_up: set[str] = set()
        self.used: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in TELLING:
            uses = self.looked_up if func is functional.embedding else self.used
            uses |= {self._names[id(one)] for one in (*args, *kwargs.values()) if self._is_known(one)}
        return func(*args, **kwargs)

    def _is_known(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self._names
