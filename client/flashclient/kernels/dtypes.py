"""The dtypes of weightd_proto.encodings as torch has them."""

from __future__ import annotations

import torch

from weightd_proto import encodings

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype.torch) for name, dtype in encodings.DTYPES.items()}
# Of what kernels compute with: rows of resident weights, of activations and of the cache.
KERNEL_DTYPES = {DTYPES[name]: name for name in encodings.COMPUTE_DTYPES.values()}
