"""torch's state that others change: what of it must not reach the tensors that this library makes.

Every tensor that meets a kernel is made with its dtype and device said, because the default dtype is one for the whole
process and may change at any moment, in any thread. What belongs to the thread that calls is set aside here: grad and
inference mode, autocast, default device and other modes of torch's functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., object])


def eager(function: Function) -> Function:
    """torch.compile() calls it, and traces nothing of it: it costs a call 1 us."""
    disabled: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def plain_torch() -> AbstractContextManager[object]:
    """For what a layer computes: neither autocast nor modes of torch's functions. Cheap where there are none."""
    if not torch.is_autocast_enabled("cpu") and torch._C._len_torch_function_stack() == 0:
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.autocast("cpu", enabled=False))
    stack.enter_context(torch._C.DisableTorchFunction())
    return stack


@contextmanager
def on_cpu() -> Iterator[None]:
    """For what transformers computes: tensors whose device nobody says lie on the CPU, as the model does."""
    if torch._C._len_torch_function_stack() == 0:
        yield
        return
    with torch.device("cpu"):
        yield


@contextmanager
def for_good() -> Iterator[None]:
    """For tensors that stay: usable in every mode."""
    with on_cpu(), torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield
