"""Attention by the native kernel, in which the bits of a row depend only on what it attends to.

The kernel is used for any number of tokens, also with sliding windows. transformers' own sdpa function computes what
the kernel cannot (gradients, dropout, other devices). This choice is fixed, for the reason given in
resident_linear.py. In decode the kernel is also faster: torch's scaled_dot_product_attention wakes its threads for each
layer of each token, which takes several times longer than reading the keys and values (scripts/bench_kernels.py).

Classes without sdpa compute attention by a function of their own: with a softcap of scores, or with sinks, which take a
share of the weights. The kernel knows both. That the function is the kernel's formula is shown by calling it with
random queries, keys and values.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils import output_capturing

from flashclient._native import Attention, Workers
from flashclient.kernels.arrays import KernelOf, array_of
from flashclient.kernels.dtypes import KERNEL_DTYPES
from flashclient.kernels.growing_cache import decoded, row_bytes
from flashclient.kernels.trials import random_tensors


class NativeName(str):
    """A name of an implementation that models take for `like` where they ask for it, but registries and != do not.

    Some models leave out what an index did not pick only for names that they know.
    """

    like: str
    __hash__ = str.__hash__

    def __new__(cls, name: str, like: str) -> NativeName:
        """See the class."""
        made = super().__new__(cls, name)
        made.like = like
        return made

    def __eq__(self, other: object) -> bool:
        """See the class."""
        return other == self.like or str.__eq__(self, other)

    def __reduce__(self) -> Any:
        return NativeName, (str(self), self.like)


# In transformers' registries, which take a name with "flash" in it for FlashAttention. Masks are those of `like`.
IMPLEMENTATION = NativeName("native_decode", "sdpa")
OF_OWN_IMPLEMENTATION = NativeName("native_of_own", "eager")  # of classes that have no sdpa
# Arguments that sdpa takes and the kernel does not.
UNSUPPORTED = ("softcap", "position_bias", "cache", "output_attentions")

# Of classes without sdpa: the name of the function by which they attend, in each module of transformers.
FUNCTION = "eager_attention_forward"
OF_OWN = ("softcap", "s_aux")  # arguments that the kernel takes for it
TRIED_ARGUMENTS = {
    *("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "kwargs", *OF_OWN),
}
TRIED_SCALES = (1.0, 30.0)  # of queries
TRIED_SCALING, TRIED_CAP = 0.3, 2.5
TRIED_TOKENS, TRIED_KEYS, TRIED_ELEMENTS = 3, 5, 16
TOLERANCE = 1e-5

_transformers_attention = AttentionInterface()["sdpa"]  # type: ignore[no-untyped-call]

Kernels = dict[torch.dtype, Attention]


@dataclass(frozen=True)
class OwnAttention:
    """The function by which a module attends where it is not native.

    Attributes:
        caps: whether it takes a softcap.
    """

    function: Callable[..., tuple[Tensor, Tensor | None]]
    caps: bool

    def takes(self, module: nn.Module, mask: Tensor | None, scaling: float | None, arguments: dict[str, Any]) -> bool:
        """Whether the kernel computes a call with these arguments, and nobody asks for the weights.

        The function adds a mask, also a boolean one, which is none of transformers' own.
        """
        sinks = arguments.get("s_aux")
        with_gradient = sinks is not None and torch.is_grad_enabled() and sinks.requires_grad
        known = sinks is _sinks_of(module) and (self.caps or arguments.get("softcap") is None)
        collected = output_capturing._active_collector.get()  # type: ignore[no-untyped-call]
        known = known and scaling is not None and (mask is None or mask.is_floating_point())
        return known and not with_gradient and "attentions" not in (collected or ())

    @staticmethod
    def arguments(arguments: dict[str, Any]) -> dict[str, Any]:
        """Those of the kernel."""
        sinks: Tensor | None = arguments.get("s_aux")
        held = None if sinks is None else array_of(sinks.detach().to(torch.float32).contiguous())
        return {"softcap": arguments.get("softcap") or 0.0, "sinks": held}

    def is_same(self, module: Any, attend: Callable[..., Tensor]) -> bool:
        """Whether the kernel's `attend` computes what the function does: with a cap and without, with any scores."""
        sinks = _sinks_of(module)
        group = getattr(module, "num_key_value_groups", 1)
        heads = 2 * group if sinks is None else len(sinks)
        some = random_tensors(torch.float32)
        mask = torch.ones(TRIED_TOKENS, TRIED_KEYS, dtype=torch.bool, device="cpu").tril(2)[None, None]
        added = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min)
        for scale, cap in product(TRIED_SCALES, (None, TRIED_CAP) if self.caps else (None,)):
            query = some(2, heads, TRIED_TOKENS, TRIED_ELEMENTS) * scale
            key, value = (some(2, heads // group, TRIED_KEYS, TRIED_ELEMENTS) for _ in range(2))
            given = {"s_aux": sinks} | ({"softcap": cap} if self.caps else {})
            try:
                expected, _ = self.function(
                    module, query, key, value, added, scaling=TRIED_SCALING, dropout=0.0, **given
                )
            except Exception:  # whatever a function raises that was not made for this
                return False
            made = attend(query, key, value, added, False, TRIED_SCALING, **self.arguments(given))
            if expected.shape != made.shape or not torch.allclose(made, expected, rtol=TOLERANCE, atol=TOLERANCE):
                return False
        return True


def own_attention(module: nn.Module) -> OwnAttention | None:
    """The function of the module's class. None where there is none, or it has arguments that no trial knows."""
    function = getattr(sys.modules.get(type(module).__module__), FUNCTION, None)
    if function is None:
        return None
    names = set(inspect.signature(function).parameters)
    return OwnAttention(function, "softcap" in names) if names <= TRIED_ARGUMENTS else None


def _sinks_of(module: nn.Module) -> Tensor | None:
    return getattr(module, "sinks", None)


def use_decode_attention(model: PreTrainedModel, workers: Workers, instruction_set: str | None = None) -> int:
    """Makes `model` use the native kernel for attention: where transformers chose sdpa, or where its class has no sdpa.

    A class without sdpa has a function of its own, with sinks or a softcap. That it is the kernel's formula is tried.

    Args:
        workers: shared with the other kernels.
        instruction_set: of the names in native/kernels/kernels.h; None takes the best.

    Returns:
        The number of modules that use it.

    Raises:
        ValueError: the processor does not have `instruction_set`.
    """
    kernels = KernelOf({dtype: Attention(workers, name, instruction_set) for dtype, name in KERNEL_DTYPES.items()})
    attentions = [module for module in model.modules() if hasattr(module, "is_causal")]  # sdpa reads it, too
    chosen = model.config._attn_implementation
    own = {} if chosen != "eager" or model._supports_sdpa else _own_attentions(attentions, kernels)
    if chosen != "sdpa" and not (own and model._can_set_attn_implementation()):
        return 0
    for module in attentions:
        module.decode_kernels = kernels  # type: ignore[assignment]
        module.__dict__["own_attention"] = own.get(module)
    name = OF_OWN_IMPLEMENTATION if own else IMPLEMENTATION
    model.set_attn_implementation(str(name))
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is not None and vars(config).get("_attn_implementation_internal") == str(name):
            config._attn_implementation_internal = name
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
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for IMPLEMENTATION; arguments and meaning are those of its sdpa function.

    A row's result depends on its query and on what it attends to alone, bit for bit: not on its batch-mates, the other
    tokens or the padding. It is summed in fp32 and rounded once.

    Args:
        query: [sequences, heads, tokens, elements]; key, value: [sequences, key heads, keys, elements], or both in int8
            (growing_cache.py), with as many elements as queries.
        attention_mask: None, or boolean or additive [sequences or 1, heads or 1, tokens, keys].

    Returns:
        [sequences, tokens, heads, elements of a value] in the dtype of query; None, or the weights where they are
        collected from a class without sdpa.
    """
    kernels: Kernels | None = getattr(module, "decode_kernels", None)
    own: OwnAttention | None = module.__dict__.get("own_attention")
    tokens = query.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and attention_mask is None and tokens > 1 and own is None  # as in sdpa
    more = kwargs if own is None else {name: one for name, one in kwargs.items() if name not in OF_OWN}
    plain = not dropout and all(more.get(name) is None or more[name] is False for name in UNSUPPORTED)
    plain = plain and (own is None or own.takes(module, attention_mask, scaling, kwargs))
    if kernels is not None and plain and _fit(kernels, query, key, value, attention_mask):
        bent = {} if own is None else own.arguments(kwargs)
        return _attend(kernels[query.dtype], query, key, value, attention_mask, causal, scaling, **bent), None
    if key.dtype == torch.uint8:  # in int8 (growing_cache.py)
        key, value = decoded(key, query), decoded(value, query)
    if own is not None:
        more = {"dropout": dropout, "scaling": scaling} | kwargs
        return own.function(module, query, key, value, attention_mask, **more)
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
    **bent: Any,
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
        **bent,
    )
    return out


def _own_attentions(attentions: list[nn.Module], kernels: Kernels) -> dict[nn.Module, OwnAttention]:
    """The function of each, where the kernel computes all of them; else none."""
    found = {module: own_attention(module) for module in attentions}
    kernel = kernels[torch.float32]
    same = all(own is not None and own.is_same(module, partial(_attend, kernel)) for module, own in found.items())
    return {module: own for module, own in found.items() if own is not None} if same else {}


def _in_kernel_form(mask: Tensor) -> Tensor:
    """A boolean mask, or fp32 with -inf where transformers' additive masks have the lowest number."""
    if mask.dtype == torch.bool:
        return mask
    return mask.to(torch.float32).masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)


for _name in (IMPLEMENTATION, OF_OWN_IMPLEMENTATION):
    AttentionInterface.register(str(_name), attend)
    AttentionMaskInterface.register(str(_name), AttentionMaskInterface()[_name.like])  # type: ignore[no-untyped-call]
