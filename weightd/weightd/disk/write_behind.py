"""Blocks of files, written by a thread behind their producer."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from weightd.disk.uncached_file import UncachedWriter, aligned_buffer

# One being written, one being filled, one in between.
BUFFERS = 3


class WriteBehind:
    """Takes filled buffers and writes them. `drain` waits for all; leaving the `with` statement drops what is left.

    A failed write is raised, as OSError, by the next `buffer` or `drain`.
    """

    def __init__(self, buffer_bytes: int) -> None:
        self.buffer_bytes = buffer_bytes
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        self._filled: SimpleQueue[tuple[UncachedWriter, memoryview, int, int] | None] = SimpleQueue()  # None: stop
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write-behind", daemon=True)

    def __enter__(self) -> Self:
        for _ in range(BUFFERS):
            self._free.put(aligned_buffer(self.buffer_bytes))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._filled.put(None)
        self._thread.join()

    def buffer(self) -> memoryview:
        """A buffer to fill; waits for one to be written."""
        buffer = self._free.get()
        self._raise()
        return buffer

    def put(self, file: UncachedWriter, buffer: memoryview, size_bytes: int, offset_bytes: int) -> None:
        """Writes the first `size_bytes` of a buffer that `buffer` gave."""
        self._filled.put((file, buffer, size_bytes, offset_bytes))

    def drain(self) -> None:
        """Waits until everything put is written. No buffer may be held."""
        buffers = [self._free.get() for _ in range(BUFFERS)]
        for buffer in buffers:
            self._free.put(buffer)
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._filled.get()) is not None:
            file, buffer, size_bytes, offset_bytes = item
            try:
                if self._error is None:
                    file.write(buffer[:size_bytes], offset_bytes)
            except BaseException as error:  # crosses to the producer
                self._error = error
            self._free.put(buffer)
