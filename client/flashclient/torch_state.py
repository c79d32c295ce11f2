"""Shields this library's tensors from torch's global state, which the user may change.

The default dtype belongs to the whole process and may change at any moment, in any thread. So every tensor for a kernel
is made with an explicit dtype and device. This module suspends state of the calling thread: grad and inference mode,
autocast, default device and torch's function modes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., object])


_process = {"compiles": True}


def never_compile() -> None:
    """Says that this process compiles nothing. Then eager() does not import the compiler, which takes half a second."""
    _process["compiles"] = False


def eager(function: Function) -> Function:
    """Makes torch.compile() call `function` without tracing it; this costs 1 us a call."""
    if not _process["compiles"]:
        return function
    disabled: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def plain_torch() -> AbstractContextManager[object]:
    """For the computation of a layer: disables autocast and torch's function modes. Cheap where there are none."""
    if not torch.is_autocast_enabled("cpu") and torch._C._len_torch_function_stack() == 0:
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.autocast("cpu", enabled=False))
    stack.enter_context(torch._C.DisableTorchFunction())
    return stack


@contextmanager
def on_cpu() -> Iterator[None]:
    """For transformers' code: puts tensors without an explicit device on the CPU, where the model is."""
    if torch._C._len_torch_function_stack() == 0:
        yield
        return
    with torch.device("cpu"):
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """For models so small that dividing the work takes longer than computing it. Also a decorator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def for_good() -> Iterator[None]:
    """For tensors that outlive the call: they are made usable in every mode."""
    with on_cpu(), torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield
