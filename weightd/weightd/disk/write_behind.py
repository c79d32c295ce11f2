"""Writes blocks of files in a thread that runs behind the producer."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from weightd.disk.uncached_file import UncachedWriter, aligned_buffer

# One is being written, one is being filled, and one is between the two.
BUFFERS = 3


class WriteBehind:
    """Takes filled buffers and writes them. `drain` waits for all of them.

    If a write fails, the next `buffer` or `drain` raises the OSError, and later buffers are not written.
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
        """A buffer to fill. Waits until one is free."""
        buffer = self._free.get()
        self._raise()
        return buffer

    def put(self, file: UncachedWriter, buffer: memoryview, size_bytes: int, offset_bytes: int) -> None:
        """Writes the first `size_bytes` of a buffer that came from `buffer`."""
        self._filled.put((file, buffer, size_bytes, offset_bytes))

    def drain(self) -> None:
        """Waits until everything is written. The caller must not hold a buffer."""
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
            except BaseException as error:  # raised in the producer's thread
                self._error = error
            self._free.put(buffer)
