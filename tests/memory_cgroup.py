"""A memory cgroup for a process that a test starts in it; the test is skipped where none may be made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from cgroup import MemoryCgroup, capped_memory


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """A cgroup of this limit, page cache included."""
    with ExitStack() as opened:
        try:
            made = opened.enter_context(capped_memory(limit_bytes))
        except OSError as error:
            pytest.skip(f"no memory cgroup can be made here: {error}")
        yield made
