"""A file for keys and values that memory has no room for, written and read past the page cache (O_DIRECT).

The file has no name, so nobody else opens it, and its room is free when the process ends, however it ends. Only this
process knows what lies where, so nothing that another server or an import of before has written is ever taken for it.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashclient._native import checksum
from flashclient.batching.timed_calls import TimedCalls

States = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [heads, held, elements]
PAGE_BYTES = 1 << 18
PIECE_PAGES = 32  # that are read or written at once, and have one checksum
ALIGNMENT_BYTES = 64
RETRY_S = 600.0  # after which a device that was full is asked for more room again
# For a piece. A device that takes longer hangs, or gives so little that keys and values are computed sooner.
ANSWER_S = 5.0
NAME = ".flashclient-kept-"  # of a file system that has no nameless files, for the moment before it is unlinked

logger = logging.getLogger("flashclient.server")


@dataclass(frozen=True)
class Pages:
    """Where states lie.

    Attributes:
        checksums: of the pieces, XXH3-64.
        shapes: of the tensors, with their dtype: keys and values of each layer in turn.
    """

    pages: Sequence[int]
    checksums: Sequence[int]
    shapes: Sequence[tuple[torch.Size, torch.dtype]]

    def held(self, layer: int) -> int:
        """The tokens that a layer holds."""
        return self.shapes[2 * layer][0][-2]


class KeptFile:
    """Not safe for several threads.

    A device that is full or fails bounds the file to what it holds for RETRY_S; nothing else happens. One that hangs is
    waited for once, for ANSWER_S, and counts as failing until it answers. The log has one line for each kind of fault,
    because a device that fails does so at each request.

    Args:
        bytes_max: of the file.

    Raises:
        OSError: the folder cannot hold such a file.
    """

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self.folder = folder
        self._descriptor = _nameless(folder)
        self._timed = TimedCalls(ANSWER_S)
        self._pages_asked = self._pages_held = bytes_max // PAGE_BYTES
        self._full_until_s = 0.0
        self._pages = 0  # of the file
        self._free: list[int] = []  # pages of the file, the least first
        self._piece = np.frombuffer(mmap.mmap(-1, PIECE_PAGES * PAGE_BYTES), np.uint8)
        self._warned: set[str] = set()
        self.written_bytes = self.read_bytes = self.damaged = 0

    def close(self) -> None:
        self._timed.close()
        if not self._timed.hangs:  # else the number may be another file's before the call ends
            os.close(self._descriptor)

    @property
    def _pages_max(self) -> int:
        return self._pages_held if time.monotonic() < self._full_until_s else self._pages_asked

    @property
    def used_bytes(self) -> int:
        return (self._pages - len(self._free)) * PAGE_BYTES

    def has_room(self, states: States) -> bool:
        return self.pages_for(states) <= self._pages_max - self._pages + len(self._free)

    def may_hold(self, states: States) -> bool:
        """Whether there would be room if nothing else was held."""
        return self.pages_for(states) <= self._pages_max

    @staticmethod
    def pages_for(states: States) -> int:
        return max(1, -(-sum(_room_of(one.nbytes) for pair in states for one in pair) // PAGE_BYTES))

    def write(self, states: States) -> Pages | None:
        """Writes what there is room for. None where the device refuses."""
        if self._timed.hangs:  # and reads self._piece
            return None
        tensors = [one for pair in states for one in pair]
        before, checksums, at = self._pages, [], 0
        pages = self._taken(self.pages_for(states))
        try:
            for run in _runs(pages):
                piece = self._piece[: len(run) * PAGE_BYTES]
                _copy(tensors, at * PAGE_BYTES, piece)
                checksums.append(checksum(piece))
                self._timed(partial(_whole, os.pwritev, self._descriptor, piece, run[0] * PAGE_BYTES))
                at += len(run)
        except OSError as error:
            self._bound(before, pages, at, error)
            return None
        self.written_bytes += len(pages) * PAGE_BYTES
        return Pages(pages, checksums, [(one.shape, one.dtype) for one in tensors])

    def read(self, place: Pages) -> States | None:
        """What lies there. None, with a line in the log, where it cannot be read or differs from its checksum."""
        at = 0
        try:
            memory = mmap.mmap(-1, len(place.pages) * PAGE_BYTES)
            whole = np.frombuffer(memory, np.uint8)
            for run, expected in zip(_runs(place.pages), place.checksums, strict=True):
                piece = whole[at : at + len(run) * PAGE_BYTES]
                self._timed(partial(_whole, os.preadv, self._descriptor, piece, run[0] * PAGE_BYTES))
                if checksum(piece) != expected:
                    raise OSError(errno.EIO, "bytes differ from their checksum")
                at += len(piece)
        except OSError as error:
            self.damaged += 1
            self._warn_once("kept keys and values are computed again", error)
            return None
        self.read_bytes += len(whole)
        return _states(memory, place)

    def free(self, place: Pages) -> None:
        """Gives the room to others."""
        for page in place.pages:
            heappush(self._free, page)

    def _taken(self, count: int) -> list[int]:
        taken = [heappop(self._free) for _ in range(min(count, len(self._free)))]
        first = self._pages
        self._pages += count - len(taken)
        assert self._pages <= self._pages_max
        return [*taken, *range(first, self._pages)]

    def _bound(self, before: int, pages: Sequence[int], written: int, error: OSError) -> None:
        """Gives back pages of which so many were written, and lets the file grow later. It had `before` pages."""
        self._pages = self._pages_held = max(before, *(page + 1 for page in pages[:written]), 0)
        self._full_until_s = time.monotonic() + RETRY_S
        for page in pages:
            if page < self._pages:
                heappush(self._free, page)
        self._warn_once("no more than %d MiB is kept", error, self._pages * PAGE_BYTES >> 20)

    def _warn_once(self, text: str, error: OSError, *values: int) -> None:
        if text not in self._warned:
            self._warned.add(text)
            reason = (error.strerror or str(error)).lower()
            logger.warning(f"%s: {text}: %s", self.folder, *values, reason)


def _nameless(folder: Path) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT
    with suppress(OSError):  # many file systems on networks and in user space have no such files
        return os.open(folder, flags | os.O_TMPFILE | os.O_EXCL, 0o600)
    for left in folder.glob(f"{NAME}*"):  # by a process that was killed before it took the name away
        with suppress(OSError):
            left.unlink()
    path = folder / f"{NAME}{secrets.token_hex(8)}"
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    finally:
        path.unlink(missing_ok=True)  # Linux makes the file before it refuses O_DIRECT


def _runs(pages: Sequence[int]) -> Iterator[Sequence[int]]:
    """Pages that follow each other, as many as a piece has at most."""
    begin = 0
    for at, (one, following) in enumerate(pairwise(pages), 1):
        if following != one + 1 or at - begin == PIECE_PAGES:
            yield pages[begin:at]
            begin = at
    yield pages[begin:]


def _room_of(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _copy(tensors: Sequence[Tensor], begin: int, piece: NDArray[np.uint8]) -> None:
    """Copies what is from byte `begin` on of tensors that follow each other."""
    at = -begin
    for tensor in tensors:
        first, last = max(at, 0), min(at + tensor.nbytes, len(piece))
        if first < last:
            piece[first:last] = tensor.view(torch.uint8).numpy().reshape(-1)[first - at : last - at]
        at += _room_of(tensor.nbytes)


def _states(memory: mmap.mmap, place: Pages) -> States:
    made, at = [], 0
    for shape, dtype in place.shapes:
        count = shape.numel()
        tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=at) if count else torch.empty(0, dtype=dtype)
        made.append(tensor.view(shape))
        at += _room_of(tensor.nbytes)
    return list(zip(made[::2], made[1::2], strict=True))


def _whole(transfer: Callable[..., int], descriptor: int, piece: NDArray[np.uint8], offset_bytes: int) -> None:
    """Reads or writes all of a piece. Raises OSError."""
    done = 0
    while done < len(piece):
        count: Any = transfer(descriptor, [piece[done:]], offset_bytes + done)
        if count == 0:
            raise OSError(errno.EIO, "the file ended early")
        done += count
