"""transformers' Conv1D, a linear layer whose matrix is transposed. The bits of a row depend on that row alone.

The kernel of ResidentLinear needs the weights of an output side by side; here those of an input are. So it is torch's
product, but always of as many rows: a matrix library picks the order of its sums by the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flashclient.kernels.trials import has_plain_weights

# Of a product. With 1600 x 4800 weights in fp32 eight rows take 2.8 times as long as one. torch multiplies fp16 row by
# row, so there more rows would only cost more.
ROWS_TOGETHER = {torch.float32: 8, torch.bfloat16: 8, torch.float16: 1}
OUTPUTS_MIN = 16  # of such a product. With one output, the sums depended on the place of a row among the eight.


class ResidentConv1D(Conv1D):
    """Conv1D whose forward pass is products of ROWS_TOGETHER rows. torch computes gradients and other dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., nx] -> [..., nf], in the dtype of x."""
        if x.dtype not in ROWS_TOGETHER or torch.compiler.is_compiling() or not has_plain_weights(self, x):
            result: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
            return result
        together = ROWS_TOGETHER[x.dtype] if self.nf >= OUTPUTS_MIN else 1
        rows = x.detach().reshape(-1, self.nx)
        y = torch.empty(len(rows), self.nf, dtype=x.dtype, device="cpu")
        # Sums may depend on where in memory a matrix lies, too.
        block = torch.zeros(together, self.nx, dtype=x.dtype, device="cpu")
        product = torch.empty(together, self.nf, dtype=x.dtype, device="cpu")
        for first in range(0, len(rows), together):
            count = min(together, len(rows) - first)
            block[:count] = rows[first : first + count]
            torch.addmm(self.bias, block, self.weight, out=product)
            y[first : first + count] = product[:count]
        return y.view(*x.shape[:-1], self.nf)


def use_resident_conv1ds(model: nn.Module) -> int:
    """Makes every Conv1D of `model` a ResidentConv1D, the same object with another class. Returns their number."""
    found = [module for module in model.modules() if type(module) is Conv1D]
    for module in found:
        module.__class__ = ResidentConv1D
    return len(found)
