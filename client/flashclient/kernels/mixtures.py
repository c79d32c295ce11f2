"""Blocks of a router and its experts, whose output is that of the experts: no shared experts are added.

This is shown by running the block's own forward, with other functions in the place of router and experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashclient.kernels.resident_router import NativeRouter
from flashclient.kernels.trials import COLLECTED_ELSEWHERE, has_tensors, is_called_alone, random_tensors

TRIED_SHAPES = ((2, 3), (1, 1))  # sequences and tokens


@dataclass(frozen=True)
class Mixture:
    """The children of such a block by what they are for."""

    router: str
    experts: str

    def streamed(self, block: nn.Module, x: Tensor) -> Any:
        """What computes the block for x [sequences, tokens, hidden] within a native layer; None: it must be called."""
        router: Any = block._modules[self.router]
        experts: Any = block._modules[self.experts]
        alone = is_called_alone(block) and is_called_alone(experts)
        if not alone or not is_called_alone(router, COLLECTED_ELSEWHERE - {"router_logits"}) or not router.is_plain(x):
            return None
        return experts.streamed.routed(router.router_kernels[x.dtype], router.native_router())


def mixture_of(block: nn.Module, experts_kind: type[nn.Module]) -> Mixture | None:
    """The parts of a block that is a mixture and nothing else; None where it is not shown.

    Args:
        experts_kind: the class of modules that stream experts.
    """
    children = dict(block.named_children())
    routers = [name for name, one in children.items() if isinstance(one, NativeRouter)]
    experts = [name for name, one in children.items() if isinstance(one, experts_kind)]
    others = [one for name, one in children.items() if name not in (*routers, *experts)]
    weights = any(next(one.parameters(), None) is not None or has_tensors(one) for one in others)
    if len(routers) != 1 or len(experts) != 1 or weights or block._parameters or has_tensors(block):
        return None
    router: Any = children[routers[0]]
    with _recorded(router, children[experts[0]]) as (routed, given):
        for shape in TRIED_SHAPES:
            x = random_tensors(router.weight.dtype)(*shape, router.weight.shape[1])
            try:
                y = block(x)
            except Exception:  # whatever a module raises that was not made for this
                return None
            if len(routed) != 1 or len(given) != 1 or not _is_same(x, y, routed.pop(), given.pop()):
                return None
    return Mixture(routers[0], experts[0])


@contextmanager
def _recorded(router: Any, experts: nn.Module) -> Iterator[tuple[list[Any], list[Any]]]:
    """What is given to router and experts, and what they return instead of their own results."""
    routed: list[Any] = []
    given: list[Any] = []
    formula = router.formula

    def instead_of_router(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        some = random_tensors(formula.dtype, seed=1)
        logits = some(len(rows), len(router.weight)).to(rows.dtype)
        weights = some(len(rows), formula.picks)
        picks = logits.topk(formula.picks).indices
        routed.append((rows, weights, picks))
        return logits, weights, picks

    def instead_of_experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = hidden_states.flip(-1) * 0.5
        given.append((hidden_states, top_k_weights, top_k_index, y))
        return y

    router.__dict__["forward"] = instead_of_router
    experts.__dict__["forward"] = instead_of_experts
    try:
        yield routed, given
    finally:
        del router.__dict__["forward"], experts.__dict__["forward"]


def _is_same(x: Tensor, y: Any, routed: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> bool:
    rows = x.reshape(-1, x.shape[-1])
    weights, picks = routed[1:]
    pairs = ((routed[0], rows), (given[0], rows), (given[1], weights), (given[2], picks))
    if not all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs):
        return False
    return (
        isinstance(y, Tensor)
        and y.dtype == x.dtype
        and y.shape == x.shape
        and torch.equal(y.view(rows.shape), given[3])
    )
