"""Reads extents of files in a given order, in a thread that runs ahead of the consumer."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from weightd.disk.uncached_file import UncachedReader, aligned_buffer

# Large enough for the device's sequential speed, and small enough that all buffers together stay below 64 MiB.
CHUNK_BYTES = 8 << 20
# Buffers that are read but not used yet. With four the device never waits for the processor; more would cost memory.
BUFFERS = 4


@dataclass(frozen=True)
class Extent:
    path: Path
    offset_bytes: int
    size_bytes: int


class ReadAhead:
    """Reads `extents`, which must be taken in the same order. Entering it starts the thread, leaving it stops it.

    It holds buffers of the largest extent's size. If a read fails, `take` raises the OSError.

    `together`: how many extents are taken at once.
    """

    def __init__(self, extents: Sequence[Extent], direct_only: bool = False, together: int = 1) -> None:
        self._extents = extents
        self._direct_only = direct_only
        self._buffers = max(BUFFERS, together)
        self._files: dict[Path, UncachedReader] = {}
        self._free: SimpleQueue[memoryview | None] = SimpleQueue()  # None: stop
        self._filled: SimpleQueue[tuple[memoryview, memoryview] | BaseException] = SimpleQueue()
        self._taken = 0
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            for path in dict.fromkeys(extent.path for extent in self._extents):
                self._files[path] = undo.enter_context(UncachedReader(path, self._direct_only))
            undo.pop_all()
        largest = max((self._files[e.path].buffer_bytes(e.size_bytes) for e in self._extents), default=0)
        for _ in range(self._buffers):
            self._free.put(aligned_buffer(largest))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._free.put(None)
        self._thread.join()
        for file in self._files.values():
            file.close()

    @contextmanager
    def take(self, extent: Extent) -> Iterator[memoryview]:
        """The bytes of the next extent. They are valid inside the `with` statement."""
        assert extent == self._extents[self._taken], "taken out of order"
        self._taken += 1
        filled = self._filled.get()
        if isinstance(filled, BaseException):
            raise filled
        buffer, data = filled
        try:
            yield data
        finally:
            self._free.put(buffer)

    @contextmanager
    def take_all(self, extents: Iterable[Extent]) -> Iterator[list[memoryview]]:
        """The bytes of the next extents. They are valid inside the `with` statement."""
        with ExitStack() as taken:
            yield [taken.enter_context(self.take(extent)) for extent in extents]

    def _run(self) -> None:
        try:
            for extent in self._extents:
                buffer = self._free.get()
                if buffer is None:
                    return
                file = self._files[extent.path]
                self._filled.put((buffer, file.read(extent.offset_bytes, extent.size_bytes, buffer)))
        except BaseException as error:  # `take` raises it in the consumer's thread
            self._filled.put(error)
