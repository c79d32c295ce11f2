"""The interface between the forward pass and the transports that bring a model's bytes.

Two sources exist. `ring.RingSource` computes on the daemon's own pool over shared memory. `grpc_chunks.GrpcSource`
computes on a pool of its own, which it fills over gRPC. Both give the same bytes, so they give the same results.

A source serves three ways of computing. Exact mode walks through all bundles of a layer: chunks(). Predict mode leases
cells one by one and keeps them as long as it likes: open_window(). Models with experts lease the cells of those experts
that the router has picked: open_walk(). Lookups in a table do the same with the cells of their rows, which have a
source of their own. A cell is the unit of leasing: one bundle, or several neighbours in placement order.

When weightd is gone, or has closed the session, everything that was leased may have changed. retry_on_loss() is the one
place that handles it: it waits, attaches again, and computes the layer again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from operator import add, sub
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from flashclient._native import CellWalk, ChunkSource, Window
from flashclient.daemon.channel import SessionLostError
from flashclient.errors import DaemonLostError

LOSSES_MAX = 5  # losses within one layer before giving up: our requests then kill weightd or break one of its rules
Result = TypeVar("Result")


@dataclass(frozen=True)
class Chunk:
    """Some bundles of one layer, next to each other in placement order.

    Valid until the next chunk is requested or the iterator is closed.
    """

    first: int  # position of the first bundle
    addresses: NDArray[np.uint64]  # of each bundle in this process's memory; bundles need not touch each other


@dataclass(frozen=True)
class Counters:
    """What a source has done so far; only differences between two calls are meaningful."""

    hits: int = 0
    misses: int = 0
    read_bytes: int = 0  # from flash, or over the wire
    prefetched: int = 0  # cells read before a step asked for them
    prefetched_used: int = 0  # those that a step has asked for: hits

    def plus(self, other: Counters) -> Counters:
        return Counters(*map(add, astuple(self), astuple(other)))

    def since(self, earlier: Counters) -> Counters:
        return Counters(*map(sub, astuple(self), astuple(earlier)))


class CellsSource(Protocol):
    """What bundle and table sources have in common. One consumer at a time."""

    @property
    def errors(self) -> AbstractContextManager[None]:
        """Wraps native code that uses this source: turns its exceptions into those of flashclient.errors."""

    def open_walk(self) -> CellWalk:
        """The one walk of this source, which leases its cells. The source empties it in idle()."""

    def idle(self) -> None:
        """Gives back everything that is leased or being fetched ahead, as at the end of a generation; never raises
        SessionLostError."""

    def require_open(self) -> None:
        """Raises SessionLostError where leased bundles may have changed, so that results from them are invalid."""

    def reattach(self, lost: SessionLostError) -> None:
        """Waits until weightd is back, at most timeout_s, and attaches again; nothing is leased then.

        Raises:
            DaemonLostError: weightd has not come back.
            RefusedError: weightd has another import of the model now.
        """


class BundleSource(CellsSource, Protocol):
    """The bundles of a model. The consumer may change between the ways of computing at any time."""

    @property
    def tables(self) -> Sequence[CellsSource]:
        """The sources of the model's tables, in the order of its record."""

    @property
    def resident(self) -> NDArray[np.uint8]:
        """The whole of resident.safetensors, writable but private to this process."""

    def predictors(self) -> NDArray[np.uint8]:
        """The whole of the newest calibration's predictors.safetensors, at an address that is a multiple of 64."""

    def chunks(self, layer: int) -> Generator[Chunk, None, None]:
        """Every bundle of `layer` in placement order. Raises SessionLostError, DaemonLostError or CorruptionError.

        The source expects the layers in order, and the first again after the last. It fetches chunks ahead, across
        layers and tokens, until idle() or a step of the window. The window is empty afterwards.
        """

    def sweep(self) -> ChunkSource | None:
        """What native code takes the chunks of chunks() from, without Python; None: there is nothing but chunks().

        The window is empty afterwards. Raises what chunks() raises.
        """

    def open_window(self, tokens: int) -> Window:
        """The one window of this source, which leases its cells. The source empties it in chunks() and idle().

        Args:
            tokens: the last tokens whose cells stay leased, the token of the step included; 0 keeps nothing.
        """

    def counters(self) -> Counters:
        """The counts continue after a loss of weightd."""

    def close(self) -> None: ...


def retry_on_loss(source: CellsSource, compute: Callable[[], Result]) -> Result:
    """Calls `compute`, which reads bundles of `source`, and calls it again after each loss of weightd.

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
