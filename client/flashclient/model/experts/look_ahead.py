"""Look-ahead by router: guesses which experts the next mixture will pick, so that weightd can read them early.

Neighbouring layers have similar inputs, because each adds little to the residual stream. So the router of the next
mixture, applied to the input of this one, picks mostly the experts that it will pick later (published: 80 to 90 %).
weightd reads what is guessed only while the device has little else to do, so a wrong guess costs nobody a wait. But it
costs memory bandwidth, and a place in the pool. Where too few of the experts that were read are used, look-ahead
pauses. A guess never changes what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flashclient._native import Router
from flashclient.kernels.resident_router import NativeRouter
from flashclient.source.bundle_source import BundleSource
from flashclient.torch_state import eager

ROWS_MAX = 4  # of a step: those of prompts pick nearly every expert
USED_MIN = 0.4  # of the cells that were read ahead: with fewer, look-ahead pauses
JUDGED_CELLS = 1024  # read ahead between two judgements: 64 experts of OLMoE; after 16 chance decided
PAUSE_STEPS = 64  # of a layer; doubles each time that look-ahead does not pay
PAUSE_STEPS_MAX = 4096


Guess = tuple[int, NDArray[np.int64]]  # a mixture, and the experts that it may pick, the likeliest first


@dataclass(frozen=True)
class FoundRouter:
    """A module that picks the experts of one mixture. `output`: where the picks are in what it returns; None: alone."""

    module: nn.Module
    output: int | None

    def picks(self, x: Tensor) -> Tensor:
        """What it picks for x. Hooks of the module do not see the call."""
        made = type(self.module).forward(self.module, x)
        picked: Tensor = made if self.output is None else made[self.output]
        return picked


class LookAhead:
    """The guesses of one model.

    Args:
        layers: the mixtures, in the order in which a forward pass calls them.
    """

    def __init__(self, source: BundleSource, layers: Sequence[int]) -> None:
        self._next = dict(pairwise(layers))
        self._first = layers[0] if layers else None
        self._routers: dict[int, FoundRouter] = {}
        self._trust = Trust(source)

    def watch(self, layer: int, experts: nn.Module, beside: Sequence[nn.Module]) -> None:
        """Finds the router of a mixture in its first step: the module beside the experts that returns their picks."""
        returned: list[tuple[nn.Module, Any, Any]] = []
        handles: list[RemovableHandle] = []

        @eager
        def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            returned.append((module, inputs, output))

        @eager
        def find(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            for handle in handles:
                handle.remove()
            if (router := _router_of(inputs, returned)) is not None:
                self._routers[layer] = router

        handles += [module.register_forward_hook(note) for module in beside]
        handles.append(experts.register_forward_pre_hook(find))

    def guess(self, layer: int, x: Tensor) -> Guess | None:
        """What the next mixture may pick. None: nothing should be read ahead.

        Args:
            x: [rows, hidden_size]: the input of the mixture `layer`.
        """
        following, router = self._after(layer, len(x)) or (0, None)
        if router is None:
            return None
        with torch.no_grad():
            picks = router.picks(x)
        by_rank = picks.reshape(len(x), -1).T.reshape(-1)
        return following, np.ascontiguousarray(by_rank.numpy(), np.int64)

    def router_after(self, layer: int, rows: int) -> tuple[int, Router] | None:
        """The next mixture and its router, which guesses within a native layer. None: nothing should be read ahead."""
        following, router = self._after(layer, rows) or (0, None)
        if router is None or not isinstance(router.module, NativeRouter):
            return None
        return following, router.module.native_router()

    def guesses_early(self, rows: int) -> bool:
        """Whether the router of a native layer guesses before its attention. After router_after(), which judges."""
        return rows <= ROWS_MAX and self._trust.pays(False)

    def _after(self, layer: int, rows: int) -> tuple[int, FoundRouter] | None:
        following = self._next.get(layer)
        router = None if following is None else self._routers.get(following)
        if following is None or router is None or rows > ROWS_MAX or not self._trust.pays(layer == self._first):
            return None
        return following, router


class Trust:
    """Whether look-ahead pays."""

    def __init__(self, source: BundleSource) -> None:
        self._source = source
        self._before = source.counters()
        self._pause = PAUSE_STEPS
        self._paused = 0  # steps for which it goes on to pause

    def pays(self, judges: bool) -> bool:
        """
        Args:
            judges: whether this is the time to look at what became of earlier guesses: once for each token.
        """
        if judges:
            self._judge()
        return self._paused == 0

    def _judge(self) -> None:
        counters = self._source.counters()
        if self._paused > 0:
            self._paused -= 1
            self._before = counters
            return
        since = counters.since(self._before)
        if since.prefetched < JUDGED_CELLS:
            return
        self._before = counters
        if since.prefetched_used >= USED_MIN * since.prefetched:
            self._pause = PAUSE_STEPS
        else:
            self._paused, self._pause = self._pause, min(2 * self._pause, PAUSE_STEPS_MAX)


def _router_of(inputs: tuple[Any, ...], returned: Sequence[tuple[nn.Module, Any, Any]]) -> FoundRouter | None:
    """The router among modules that have returned, by what the experts are called with: x and picks."""
    if len(inputs) < 2:
        return None
    x, picks = inputs[:2]
    for module, taken, made in returned:
        if len(taken) != 1 or not isinstance(taken[0], Tensor) or taken[0].shape != x.shape:
            continue
        outputs = made if isinstance(made, tuple) else (made,)
        for index, output in enumerate(outputs):
            if output is picks:
                return FoundRouter(module, index if isinstance(made, tuple) else None)
    return None
