"""Resident matrices that stay in the blocks in which the store holds them.

A linear layer multiplies with the blocks, an embedding decodes the rows that it looks up. Where anything else needs the
values, they are decoded when the model is built.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from flashclient.errors import some
from flashclient.kernels.encoded_matrix import BlockRows, WeightInBlocks
from flashclient.kernels.resident_linear import ResidentLinear
from flashclient.model.absent_weights import HoldsAbsentWeights, become
from flashclient.model.tables.embedding import AbsentTable
from weightd_proto.tables import WEIGHT

log = logging.getLogger(__name__)


class EncodedWeight(WeightInBlocks, AbsentTable):
    """The weight of a linear layer or an embedding, or of both. dequantize() returns its values.

    torch multiplies with values that it decodes for one call. What else needs the values raises an AbsentWeightError.
    """

    rows: BlockRows
    instead = "its dequantize() returns the values, decoded"

    @classmethod
    def of_blocks(cls, rows: BlockRows, path: str, dtype: torch.dtype) -> EncodedWeight:
        weight = cls.of_rows(rows, path, torch.empty(rows.shape, dtype=dtype, device="meta"))
        assert isinstance(weight, cls)
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.dequantize:
            return args[0].rows.values()
        if func is Tensor.data_ptr:
            return args[0].rows.matrix.address
        if func is Tensor.__len__:
            return args[0].rows.shape[0]
        if func is functional.linear and isinstance(args[1], cls):
            return functional.linear(args[0], args[1].rows.values(), *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def settle_encoded_weights(model: PreTrainedModel) -> list[str]:
    """Decodes the encoded weights that not only linear layers and embeddings have. After use_fast_linears().

    Returns:
        The paths of the modules whose weights were decoded.
    """
    decoded = []
    for path, module in model.named_modules():
        names = [name for name, weight in module._parameters.items() if isinstance(weight, EncodedWeight)]
        if names == [WEIGHT] and isinstance(module, ResidentLinear | nn.Embedding):
            module.__dict__["path"] = path
            become(module, HoldsAbsentWeights)
            continue
        for name in names:
            weight: Any = module._parameters[name]
            module._parameters[name] = nn.Parameter(weight.rows.values(), requires_grad=False)
            decoded.append(path)
    if decoded:
        log.warning("decoded for modules that compute in no kernel: the weights of %s", some(decoded))
    return decoded
