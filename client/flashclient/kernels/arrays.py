"""How tensors are passed to native kernels, and how torch modules hold kernels."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from flashclient.errors import ModelError

Kernel = TypeVar("Kernel")


class KernelOf(dict[torch.dtype, Kernel]):
    """A kernel for each dtype. A kernel belongs to the process: a copied module shares it, and it cannot be pickled."""

    def takes(self, x: Tensor) -> bool:
        """Whether there is a kernel for x: not empty, on the CPU, of a dtype that autocast does not change."""
        return x.dtype in self and x.is_cpu and x.numel() > 0 and not torch.is_autocast_enabled("cpu")

    def __deepcopy__(self, memo: Any) -> KernelOf[Kernel]:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ModelError("a module with native kernels cannot be pickled: save its state_dict()")


def array_of(tensor: Tensor) -> Any:
    """The memory of `tensor` for one call of a kernel, to read or to write. Takes 0.4 us, where numpy() takes 3.

    It carries dtype, shape and strides, which the kernels check. It works for bfloat16, which numpy does not have.
    """
    return to_dlpack(tensor.detach() if tensor.requires_grad else tensor)
