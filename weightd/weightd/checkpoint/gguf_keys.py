"""Reads the keys `ARCHITECTURE.*` of a GGUF header, and notes which of them were read.

A key that nothing has read must have no meaning for the model, or the value that changes nothing. Otherwise it is
refused by its name. Meanings are llama.cpp's (llama-model.cpp: load_hparams).
"""

from __future__ import annotations

import math
from reprlib import Repr
from typing import Any, NoReturn

import numpy as np

from weightd.checkpoint.gguf_file import GgufFile
from weightd.errors import CheckpointError

# These describe the file or how it was made, have been replaced by others, or belong to a scaling that others turn on.
WITHOUT_MEANING = {
    "rope.scaling.finetuned", "tensor_data_layout", "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon",
    "rope.scale_linear", "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}  # fmt: skip
# Where nothing has read them, these must have this value: transformers' class supports no other.
NEUTRAL: dict[str, Any] = {
    "attention.causal": True, "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0,
    "attention.output_scale": 1.0, "attn_logit_softcapping": 0.0, "embedding_scale": 1.0, "expert_count": 0,
    "expert_group_count": 0, "attention.sliding_window": 0, "final_logit_softcapping": 0.0,
    "expert_group_used_count": 0, "expert_shared_count": 0, "logit_scale": 1.0, "nextn_predict_layers": 0,
    "pooling_type": 0, "residual_scale": 1.0, "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_log_multiplier": 0.0, "router_logit_softcapping": 0.0,
    "swin_norm": False, "use_parallel_residual": False,
}  # fmt: skip
# The same for models with experts. Others may have any value.
NEUTRAL_EXPERTS: dict[str, Any] = {
    "expert_weights_norm": None, "expert_weights_scale": 1.0, "expert_gating_func": 1, "leading_dense_block_count": 0,
    "interleave_moe_layer_step": 1, "expert_used_count": None, "expert_feed_forward_length": None,
    "expert_shared_feed_forward_length": 0,
}  # fmt: skip
# For these, an array with one value is not the same as the value.
ARRAYS = ("attention.sliding_window_pattern",)


SHORT = Repr()  # an array may have any number of elements, and an error is a line
SHORT.maxlist = SHORT.maxstring = 100


class GgufKeys:
    """Every method takes the name of a key without the architecture."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._prefix = f"{file.architecture}."
        self._read: set[str] = set()

    def check_all_read(self, mixture: bool, normed: bool) -> None:
        """CheckpointError names a key that was not read and could have a meaning.

        `normed`: whether the weights of picked experts are divided by their sum.
        """
        neutral = NEUTRAL | NEUTRAL_EXPERTS | {"expert_weights_norm": normed} if mixture else NEUTRAL
        without_meaning = WITHOUT_MEANING if mixture else WITHOUT_MEANING | NEUTRAL_EXPERTS.keys()
        for key in self._file.metadata:
            name = key.removeprefix(self._prefix)
            if name == key or name in self._read or name in without_meaning:
                continue
            value = self.value(name)
            if name not in neutral:
                self.refuse(name, value, f"which weightd does not know in {self._file.architecture} models")
            if not _equal(value, neutral[name]):
                self.refuse(name, value, f"and only {neutral[name]!r} can be run")

    def refuse(self, name: str, value: Any, why: str) -> NoReturn:
        if value is None:
            raise CheckpointError(f"{self._file.path} lacks {self._prefix}{name}")
        raise CheckpointError(f"{self._file.path} has {self._prefix}{name} = {SHORT.repr(value)}, {why}")

    def value(self, name: str) -> Any:
        """The key's value, or None. An array with one value for all layers is that value."""
        self._read.add(name)
        value = self._file.metadata.get(self._prefix + name)
        if value is None:
            return None
        if isinstance(value.content, np.ndarray | list):
            items = list(np.asarray(value.content).tolist())
            if name not in ARRAYS and items and all(item == items[0] for item in items):
                return items[0]
            return items
        return value.content

    def size(self, name: str, default: int | None = None) -> int:
        value = self.value(name)
        value = default if value is None else value
        if type(value) is not int or value <= 0:
            self.refuse(name, value, "expected one positive number")
        return int(value)

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.value(name)
        value = default if value is None else value
        number = float(value) if value is not None and type(value) in (int, float) else math.nan
        if not 0 < number < math.inf:
            self.refuse(name, value, "expected a positive number")
        return number

    def optional(self, name: str) -> float | None:
        """A positive number. None if the key is missing, or 0, which turns the feature off."""
        value = self.value(name)
        return None if value is None or value == 0 else self.positive(name)

    def require(self, name: str, expected: float, default: float | None = None) -> None:
        """Refuses any other value than `expected`."""
        value = self.positive(name, expected if default is None else default)
        if not math.isclose(value, expected, rel_tol=1e-5):
            self.refuse(name, value, f"and only {expected:.6g} can be run")


def _equal(value: Any, expected: Any) -> bool:
    if isinstance(expected, bool):
        return value is expected
    return type(value) in (int, float) and bool(value == expected)
