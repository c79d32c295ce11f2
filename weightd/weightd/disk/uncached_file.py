"""Reads and writes files past the page cache (O_DIRECT), in large aligned requests.

O_DIRECT needs offsets, sizes and memory that are aligned to the block size. The ranges that callers ask for need not be
aligned. Buffers are anonymous mappings, made once and reused.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path

from weightd._native import block_size_bytes
from weightd.closing import Closing
from weightd.errors import DeviceError
from weightd.sizes import round_up

# ext2, FUSE and network file systems lack fallocate, or a filter of system calls refuses it. Then glibc writes a byte
# into each block, which fails with EINVAL or EBADF for O_DIRECT and O_WRONLY. Without a reservation, a full device is
# noticed by the write that fails.
CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL, errno.EBADF)

OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # or a FIFO in a file's place would be waited for, for ever


def aligned_buffer(size_bytes: int) -> memoryview:
    """Page-aligned memory of zeros that takes no page until it is used; huge pages where the system has them."""
    mapping = mmap.mmap(-1, max(size_bytes, mmap.PAGESIZE))
    with suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapping)[:size_bytes]


class _UncachedFile(Closing):
    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.block_bytes = block_size_bytes(str(path))

    def close(self) -> None:
        os.close(self.descriptor)

    def _failed(self, error: OSError, offset_bytes: int) -> OSError:
        return OSError(error.errno, f"{error.strerror} at offset {offset_bytes}", str(self.path))


class UncachedReader(_UncachedFile):
    """Reads ranges of a file. If O_DIRECT is refused, reads go through the page cache and are dropped from it.

    That fallback is for checkpoints, which may lie on any file system. `direct_only` raises DeviceError instead.
    """

    def __init__(self, path: Path, direct_only: bool = False) -> None:
        self.buffered = False
        try:
            descriptor = os.open(path, OPEN_FLAGS | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            if direct_only:
                raise DeviceError(_refusal(path)) from error
            descriptor = os.open(path, OPEN_FLAGS)
            self.buffered = True
        super().__init__(path, descriptor)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise OSError(errno.ESPIPE, "not a regular file", str(path))
        self.size_bytes = status.st_size

    def buffer_bytes(self, size_bytes: int) -> int:
        """The size of a buffer that can take any `size_bytes` of this file."""
        return round_up(size_bytes, self.block_bytes) + self.block_bytes

    def read(self, offset_bytes: int, size_bytes: int, buffer: memoryview) -> memoryview:
        """Reads the blocks around the range into `buffer` and returns the part of it that is the range.

        OSError has the path and the offset, also if the file ends early.
        """
        lead_bytes = offset_bytes % self.block_bytes
        begin = offset_bytes - lead_bytes
        wanted_bytes = lead_bytes + size_bytes
        target = buffer[: round_up(wanted_bytes, self.block_bytes)]
        done_bytes = 0
        while done_bytes < wanted_bytes:
            count = self._read_some(target[done_bytes:], begin + done_bytes)
            done_bytes += count
            if done_bytes < wanted_bytes:
                if count == 0 or begin + done_bytes >= self.size_bytes:
                    reason = f"file ended at {begin + done_bytes}, {offset_bytes + size_bytes} bytes expected"
                    raise OSError(errno.EIO, reason, str(self.path))
                done_bytes -= done_bytes % self.block_bytes  # after a short read: the next request must be aligned
        if self.buffered:
            os.posix_fadvise(self.descriptor, begin, len(target), os.POSIX_FADV_DONTNEED)
        return target[lead_bytes:wanted_bytes]

    def _read_some(self, target: memoryview, offset_bytes: int) -> int:
        try:
            return os.preadv(self.descriptor, [target], offset_bytes)
        except OSError as error:
            raise self._failed(error, offset_bytes) from error


class UncachedWriter(_UncachedFile):
    """Writes a new file of `size_bytes`. Its blocks are reserved first if the file system can. `finish` syncs it.

    DeviceError if the file system refuses O_DIRECT. With `allow_buffered`, the file is then written through the page
    cache, and dropped from it at the end.
    """

    def __init__(self, path: Path, size_bytes: int, allow_buffered: bool = False) -> None:
        self.size_bytes = size_bytes
        self.buffered = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # Linux creates the file before it refuses O_DIRECT
            if not allow_buffered:
                raise DeviceError(_refusal(path)) from error
            descriptor = os.open(path, flags, 0o644)
            self.buffered = True
        super().__init__(path, descriptor)
        self._reserve()

    def _reserve(self) -> None:
        if self.size_bytes == 0:
            return
        try:
            os.posix_fallocate(self.descriptor, 0, round_up(self.size_bytes, self.block_bytes))
        except OSError as error:
            if error.errno in CANNOT_RESERVE:
                return
            self.close()
            raise self._failed(error, 0) from error

    def write(self, data: memoryview, offset_bytes: int) -> None:
        """Writes `data` (aligned memory) at a multiple of block_bytes. Only the last block may be incomplete."""
        assert offset_bytes % self.block_bytes == 0
        assert len(data) % self.block_bytes == 0
        done_bytes = 0
        while done_bytes < len(data):
            try:
                done_bytes += os.pwritev(self.descriptor, [data[done_bytes:]], offset_bytes + done_bytes)
            except OSError as error:
                raise self._failed(error, offset_bytes + done_bytes) from error

    def finish(self) -> None:
        """Removes the padding of the last block and syncs."""
        os.ftruncate(self.descriptor, self.size_bytes)
        os.fsync(self.descriptor)
        if self.buffered:
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _refusal(path: Path) -> str:
    return (
        f"the file system of {path.parent} refuses O_DIRECT: put the store on a local disk (ext4, xfs), "
        "or pass --allow-buffered"
    )
