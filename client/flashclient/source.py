"""Where a model's bytes come from: the border between the transports and the forward pass.

Two sources exist: `session.RingSource` computes on the daemon's own pool over shared memory, `remote.GrpcSource` on a
pool of its own that it fills over gRPC. Both give the same bytes in the same order, so they give the same results.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Chunk:
    """Some bundles of one layer, next to each other in placement order.

    Valid until the next chunk is asked for or the iterator is closed; whoever computes must be done by then.
    """

    first: int  # position of the first bundle
    addresses: NDArray[np.uint64]  # of each bundle in this process's memory; bundles need not touch each other


@dataclass(frozen=True)
class Counters:
    """What the pool behind a source has done so far; only differences mean something."""

    hits: int = 0
    misses: int = 0
    read_bytes: int = 0  # from flash, or over the wire

    def since(self, earlier: Counters) -> Counters:
        return Counters(self.hits - earlier.hits, self.misses - earlier.misses, self.read_bytes - earlier.read_bytes)


class BundleSource(Protocol):
    """One consumer at a time; it walks the layers in order and begins again with each token.

    A source looks ahead by itself, across layers and tokens, for as long as it is not told to be idle.
    """

    @property
    def resident(self) -> NDArray[np.uint8]:
        """The whole of resident.safetensors, writable but private to this process."""

    def chunks(self, layer: int) -> Generator[Chunk, None, None]:
        """Every bundle of `layer` in placement order. Raises DaemonLostError or CorruptionError."""

    def idle(self) -> None:
        """The end of a generation: lets go of what is leased or being fetched ahead."""

    def counters(self) -> Counters: ...

    def close(self) -> None: ...
