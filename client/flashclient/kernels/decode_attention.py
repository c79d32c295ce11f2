"""Attention by the native kernel, in which the bits of a row depend only on what it attends to.

The kernel is used for any number of tokens, also with sliding windows. transformers' own sdpa function computes what
the kernel cannot (gradients, dropout, softcaps, other devices). This choice is fixed, for the reason given in
resident_linear.py. In decode the kernel is also faster: torch's scaled_dot_product_attention wakes its threads for each
layer of each token, which takes several times longer than reading the keys and values (scripts/bench_kernels.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from flashclient._native import Attention, Workers
from flashclient.kernels.arrays import KernelOf, array_of
from flashclient.kernels.dtypes import KERNEL_DTYPES
from flashclient.kernels.growing_cache import decoded, row_bytes

IMPLEMENTATION = "native_decode"  # in transformers' registries, which take a name with "flash" in it for FlashAttention
# Arguments that sdpa takes and the kernel does not.
UNSUPPORTED = ("softcap", "position_bias", "cache", "output_attentions")

_transformers_attention = AttentionInterface()["sdpa"]  # type: ignore[no-untyped-call]

Kernels = dict[torch.dtype, Attention]


def use_decode_attention(model: PreTrainedModel, workers: Workers, instruction_set: str | None = None) -> int:
    """Makes `model` use the native kernel for attention, where transformers chose sdpa for it.

    Args:
        workers: shared with the other kernels.
        instruction_set: amx, avx512, avx2 or portable; None takes the best.

    Returns:
        The number of modules that use it.

    Raises:
        ValueError: the processor does not have `instruction_set`.
    """
    kernels = KernelOf({dtype: Attention(workers, name, instruction_set) for dtype, name in KERNEL_DTYPES.items()})
    if model.config._attn_implementation != "sdpa":
        return 0
    attentions = [module for module in model.modules() if hasattr(module, "is_causal")]  # sdpa reads it, too
    for module in attentions:
        module.decode_kernels = kernels  # type: ignore[assignment]
    model.set_attn_implementation(IMPLEMENTATION)
    return len(attentions)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for IMPLEMENTATION; arguments and meaning are those of its sdpa function.

    A row's result depends on its query and on what it attends to alone, bit for bit: not on its batch-mates, the other
    tokens or the padding. It is summed in fp32 and rounded once.

    Args:
        query: [sequences, heads, tokens, elements]; key, value: [sequences, key heads, keys, elements], or both in int8
            (growing_cache.py), with as many elements as queries.
        attention_mask: None, or boolean or additive [sequences or 1, heads or 1, tokens, keys].

    Returns:
        [sequences, tokens, heads, elements of a value] in the dtype of query; None.
    """
    kernels: Kernels | None = getattr(module, "decode_kernels", None)
    tokens = query.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and attention_mask is None and tokens > 1  # as in sdpa
    plain = not dropout and all(kwargs.get(name) is None or kwargs[name] is False for name in UNSUPPORTED)
    if kernels is not None and plain and _fit(kernels, query, key, value, attention_mask):
        return _attend(kernels[query.dtype], query, key, value, attention_mask, causal, scaling), None
    if key.dtype == torch.uint8:  # in int8 (growing_cache.py)
        key, value = decoded(key, query), decoded(value, query)
    result: tuple[Tensor, None] = _transformers_attention(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return result


def _fit(kernels: Kernels, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel can compute this call."""
    if torch.compiler.is_compiling() or query.numel() == 0 or query.dtype not in kernels:
        return False
    sequences, heads, tokens, elements = query.shape
    int8 = key.dtype == torch.uint8
    held, width = (torch.uint8, row_bytes(elements)) if int8 else (query.dtype, elements)
    tensors = ((query, query.dtype), (key, held), (value, held))
    if not all(tensor.is_cpu and tensor.dtype == dtype and tensor.stride(-1) == 1 for tensor, dtype in tensors):
        return False
    if torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and any(one.requires_grad for one, _ in tensors)):
        return False
    fits = key.shape[:3] == value.shape[:3] and key.shape[0] == sequences and key.shape[3] == width
    return fits and heads % key.shape[1] == 0 and (mask is None or _mask_fits(mask, sequences, heads, tokens, key))


def _mask_fits(mask: Tensor, sequences: int, heads: int, tokens: int, key: Tensor) -> bool:
    known = mask.is_cpu and (mask.dtype == torch.bool or mask.is_floating_point()) and not mask.requires_grad
    return (
        known
        and mask.dim() == 4
        and mask.shape[0] in (1, sequences)
        and mask.shape[1] in (1, heads)
        and mask.shape[2:] == (tokens, key.shape[2])
    )


def _attend(
    kernel: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float | None,
) -> Tensor:
    sequences, heads, tokens, elements = query.shape
    of_value = elements if value.dtype == torch.uint8 else value.shape[3]
    out = torch.empty(sequences, tokens, heads, of_value, dtype=query.dtype, device="cpu")
    kernel.attend(
        array_of(query),
        array_of(key),
        array_of(value),
        None if mask is None else array_of(_in_kernel_form(mask)),
        causal,
        elements**-0.5 if scaling is None else scaling,
        array_of(out),
    )
    return out


def _in_kernel_form(mask: Tensor) -> Tensor:
    """A boolean mask, or fp32 with -inf where transformers' additive masks have the lowest number."""
    if mask.dtype == torch.bool:
        return mask
    return mask.to(torch.float32).masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, AttentionMaskInterface()["sdpa"])  # type: ignore[no-untyped-call]
