"""Where a model's bytes come from: the border between the transports and the forward pass.

Two sources exist: `session.RingSource` computes on the daemon's own pool over shared memory, `remote.GrpcSource` on a
pool of its own that it fills over gRPC. Both give the same bytes, so they give the same results.

A source serves two ways of computing. Exact mode walks through all bundles of a layer: chunks(). Predict mode asks for
some cells and holds them as long as it likes: exchange(), arrived(), addresses(). A cell is what is held as one: one
bundle, or `bundles_per_cell` neighbours in placement order.

When weightd is gone, or has closed the session, all that was held may have changed or gone. retry_on_loss() is the one
place that handles it: it waits, attaches again, and begins the layer anew.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from flashclient.daemon.channel import SessionLostError
from flashclient.errors import DaemonLostError

LOSSES_MAX = 5  # within one layer; more mean a weightd that our requests kill, or one that we break a rule of
Result = TypeVar("Result")


@dataclass(frozen=True)
class Chunk:
    """Some bundles of one layer, next to each other in placement order.

    Valid until the next chunk is asked for or the iterator is closed; whoever computes must be done by then.
    """

    first: int  # position of the first bundle
    addresses: NDArray[np.uint64]  # of each bundle in this process's memory; bundles need not touch each other


@dataclass(frozen=True)
class Counters:
    """What was done for a source so far; only differences mean something."""

    hits: int = 0
    misses: int = 0
    read_bytes: int = 0  # from flash, or over the wire

    def plus(self, other: Counters) -> Counters:
        return Counters(self.hits + other.hits, self.misses + other.misses, self.read_bytes + other.read_bytes)

    def since(self, earlier: Counters) -> Counters:
        return Counters(self.hits - earlier.hits, self.misses - earlier.misses, self.read_bytes - earlier.read_bytes)


class LeaseRefusedError(Exception):
    """The lease limit has sunk below what was asked for: let go of what is held, then ask again. Never seen outside."""


class BundleSource(Protocol):
    """One consumer at a time, which changes between the two ways of computing as it likes.

    Attributes:
        bundles_per_cell, stride_bytes: a cell's bundles, and the distance from one to the next.
    """

    bundles_per_cell: int
    stride_bytes: int

    @property
    def share_cells(self) -> int:
        """Cells that may always be held at once, whatever others hold; at least 1."""

    @property
    def resident(self) -> NDArray[np.uint8]:
        """The whole of resident.safetensors, writable but private to this process."""

    def predictors(self) -> NDArray[np.uint8]:
        """The whole of the newest calibration's predictors.safetensors, at an address that is a multiple of 64."""

    def chunks(self, layer: int) -> Generator[Chunk, None, None]:
        """Every bundle of `layer` in placement order. Raises SessionLostError, DaemonLostError or CorruptionError.

        It walks the layers in order and begins again with each token, and looks ahead by itself, across layers and
        tokens, until it is told to be idle or cells are asked for.
        """

    @property
    def lease_limit(self) -> int:
        """Cells of all layers together that may be held at once, now: the share, and what may be borrowed."""

    @property
    def cells_held(self) -> int:
        """Those that exchange() asked for, that have arrived and that it has not given back."""

    def addresses(self, layer: int) -> NDArray[np.uint64]:
        """Where each cell of `layer` lies, 0 if it is not held or has not arrived: a view that changes by itself."""

    def exchange(self, layer: int, acquire: NDArray[np.uint32], release: NDArray[np.uint32]) -> None:
        """Gives back some cells of `layer`, then asks for others. Does not wait."""

    def arrived(self) -> int:
        """Waits for more of the cells last asked for; returns how many are still to come.

        Raises LeaseRefusedError, SessionLostError, DaemonLostError or CorruptionError.
        """

    def idle(self) -> None:
        """Lets go of all that is held or being fetched ahead, as at the end of a generation; lost or not."""

    def require_open(self) -> None:
        """Raises SessionLostError where what was held may have changed or gone, so that nothing read of it counts."""

    def reattach(self, lost: SessionLostError) -> None:
        """Waits until weightd is back, at most timeout_s, and attaches again; nothing is held then.

        Raises:
            DaemonLostError: it has not come back.
            RefusedError: it has another import of the model now.
        """

    def counters(self) -> Counters:
        """Goes on where weightd was lost meanwhile."""

    def close(self) -> None: ...


def retry_on_loss(source: BundleSource, compute: Callable[[], Result]) -> Result:
    """What `compute` makes of bundles of `source`, made anew after each loss of weightd.

    `compute` keeps nothing of a failed attempt, so the result has the same bits as without a loss.

    Raises:
        DaemonLostError: weightd has not come back in time, or is lost again and again.
        Whatever else `compute` raises.
    """
    for _ in range(LOSSES_MAX):
        try:
            result = compute()
            source.require_open()
            return result
        except SessionLostError as error:
            lost = error
        source.reattach(lost)
    raise DaemonLostError(f"lost {LOSSES_MAX} times within one layer: see the log of weightd") from lost
