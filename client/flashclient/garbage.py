"""Python's search for garbage, off while something large is made that stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Inside the `with` statement nothing is searched.

    The modules of torch and transformers, and the words of a tokenizer, are a million objects. They are searched again
    and again while they are made, which takes a sixth of the time of the imports, and a third of a tokenizer's.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
