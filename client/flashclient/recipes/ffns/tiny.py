"""A tiny instance of a model's class, with every kind of layer of the real one, in less than a megabyte.

The types of the fields of transformers' configs do not tell sizes from other numbers, but their names do: a table of
patterns gives the tiny value of each. What has one entry for each layer is cut to the first layers.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _get_model_class
from transformers.pytorch_utils import Conv1D

from flashclient.errors import ModelError
from flashclient.model.activations import HELD

HIDDEN = 64
HEADS = 4
HEAD_DIM = 16
ROTARY_DIM = 8  # where it has a field of its own
VOCABULARY = 256
LAYERS_MIN = 4
SEED = 11
REASON_CHARACTERS_MAX = 300
GAIN = 1.5  # standard deviation of a projection's output for inputs of unit variance


@dataclass(frozen=True)
class _Scale:
    """What the fields of one config become tiny by: its own sizes, or those of the config that it is a part of."""

    layers: int
    layers_real: int
    hidden_real: int
    heads_real: int
    rotated: int = HEAD_DIM  # of a tiny head


def _constant(value: int) -> Callable[[int, _Scale], int]:
    return lambda real, scale: value


def _at_most(most: int) -> Callable[[int, _Scale], int]:
    return lambda real, scale: min(real, most)


def _like_hidden(real: int, scale: _Scale) -> int:
    return HIDDEN if real == scale.hidden_real else max(8, min(2 * HIDDEN, HIDDEN * real // scale.hidden_real // 8 * 8))


def _key_heads(real: int, scale: _Scale) -> int:
    return 1 if real == 1 else HEADS if real >= scale.heads_real else HEADS // 2


def _double_hidden_by_heads(real: int, scale: _Scale) -> int:
    return 2 * HIDDEN // HEADS


def _layers(real: int, scale: _Scale) -> int:
    return min(real, scale.layers)


def _share_of_layers(real: int, scale: _Scale) -> int:
    if real >= scale.layers_real:
        return scale.layers
    return max(1, min(scale.layers - 1, real * scale.layers // scale.layers_real))


_LAYERS = r"(num_|n_)?(hidden_|decoder_|encoder_)?(layers|layer|blocks)|num_layers_per_stack|depth"
_HIDDEN = r"hidden_size|n_embd|d_model|emb_dim|embedding_dim"
_HEADS = r"num_attention_heads|n_heads?|num_heads|(num_)?(decoder_|encoder_)?attention_heads"
PICKS = r"num_experts_per_tok(en)?|moe_(top_?)?k|top_k_experts|num_selected_experts"  # experts for each token

# The first pattern that matches the whole name of a field counts. Integers whose names match none stay as they are.
_SIZES: tuple[tuple[str, Callable[[int, _Scale], int]], ...] = (
    (_LAYERS, _layers),
    (r"num_kv_shared_layers", _share_of_layers),
    (r"first_k_dense_replace|num_dense_layers|num_dense_layer", lambda real, scale: min(real, scale.layers - 1)),
    (r"\w*vocab_size\w*|\w*group_vocab", _constant(VOCABULARY)),
    (r"hidden_size_global", _constant(HIDDEN)),
    (r"attention_head_dim", _double_hidden_by_heads),
    (_HIDDEN + r"|\w*embedding_size|\w*embed_dim|word_embed_proj_dim|lru_width|attention_hidden_size|laurel_rank"
     r"|hidden_size_per_layer_input|axial_pos_embds_dim|backbone_hidden_size|out_hidden_size|router_hidden_size",
     _like_hidden),
    (r"(moe|expert)_(intermediate|ffn_hidden)_size", _constant(24)),
    (r"(moe_)?shared_(experts?_)?intermediate_size", _at_most(40)),
    (r"\w*(intermediate_size|ffn_dim|ffn_hidden_size)(_mlp)?|n_inner|dff|d_ff|dim_ff|d_inner|feed_forward_size|mlp_dim",
     _constant(96)),
    (r"linear_num_value_heads|index_n_heads|swa_num_attention_heads", _constant(HEADS)),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", _at_most(2 * HIDDEN // HEAD_DIM)),
    (r"\w*(key_value|kv|key|value)_heads|kv_n_heads|num_query_groups|\w*key_value_heads\w*", _key_heads),
    (_HEADS + r"|num_attention_heads_per_layer|linear_num_heads", _constant(HEADS)),
    (r"qk_head_dim", _constant(HEAD_DIM + 8)),
    (r"qk_rope_head_dim|rotary_dim", _constant(ROTARY_DIM)),
    (r"\w*head_?dim|attention_head_size|d_head|dim_head|kv_channels|d_kv|mamba_d_head", _constant(HEAD_DIM)),
    (r"mamba_d_ssm", _constant(2 * HIDDEN)),
    (r"\w*(d_state|state_size)", _at_most(16)),
    (r"\w*(dt_rank|time_step_rank)", _at_most(4)),
    (r"(mamba_)?n_?groups|o_groups", _at_most(2)),
    (r"q_lora_rank|o_lora_rank|moe_latent_size", _at_most(24)),
    (r"kv_lora_rank", _at_most(32)),
    (r"\w*(num|n)_(\w+_)?experts", _at_most(8)),
    (PICKS, _at_most(2)),
    (r"n_group|num_expert_group", _at_most(2)),
    (r"topk_group|n_shared_experts|\w*num_shared_experts", _at_most(1)),
    (r"zero_expert_num", _at_most(4)),
    (r"index_topk|index_block_size", _at_most(4)),  # so that an index leaves some tokens out
    (r"index_topk_blocks", _at_most(1)),
)  # fmt: skip
# Sizes that are sums of others wherever a config has them as such.
_SUMS = [
    ("head_dim", ["qk_rope_head_dim"]),
    ("head_dim", ["qk_nope_head_dim", "qk_rope_head_dim"]),
    ("qk_head_dim", ["qk_nope_head_dim", "qk_rope_head_dim"]),
]
# Heads of Mamba layers and their width, whose product is a multiple of the hidden size.
_MAMBA_HEADS = [
    ("num_heads", "head_dim", "expand"),
    ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
    ("n_mamba_heads", "mamba_headdim", "mamba_expand"),
]
_BY_FREQUENCY = {"short_factor", "long_factor"}  # with a number for each rotary frequency
_TOKEN = re.compile(r"\w*(token_id|token_index|_index|token_ids)|(unk|mask|pad|bos|eos)_index")
_LAYER_NUMBERS = re.compile(r"\w*(layers|layer_ids|idxs|indices|indexes)")
# Tables that are neither sizes nor configs of a part of the model.
_KEPT = {"id2label", "label2id", "task_specific_params", "quantization_config"}


def model_class(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that AutoModelForCausalLM takes for `config`, and the config that this class is made from.

    Raises:
        ModelError: transformers has no class for it; code of a checkpoint is never run.
    """
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise ModelError(f"transformers {_version()} has no causal language model for model_type {config.model_type!r}")
    found: type[PreTrainedModel] = _get_model_class(config, mapping)  # type: ignore[no-untyped-call]
    text = config.sub_configs.get("text_config")
    if text is not None and found.config_class == text:
        return found, config.get_text_config()
    return found, config


def _version() -> str:
    import transformers

    return transformers.__version__


def tiny_config(config: PreTrainedConfig, layers: int = LAYERS_MIN) -> PreTrainedConfig:
    """A config of the same class: small sizes, the first `layers` layers, the same flags and functions."""
    values = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    tiny = _shrunk(values, _Scale(layers, layers, HIDDEN, HEADS)) | {"use_cache": False}
    made = type(config).from_dict(tiny)
    made._attn_implementation = "eager"
    made._experts_implementation = "eager"
    return made


def _shrunk(values: dict[str, Any], outer: _Scale) -> dict[str, Any]:
    scale = _scale(values, outer)
    ids = _Tokens()
    tiny = {name: _tiny(name, value, scale, ids) for name, value in values.items()}
    for name in _BY_FREQUENCY & values.keys():
        rotated = int(scale.rotated * (values.get("partial_rotary_factor") or 1))  # of Phi-4-mini three quarters
        tiny[name] = values[name] and values[name][: rotated // 2]
    by_layer = values.get("per_layer_config") or {}
    for layer in (None, *by_layer):
        of, made = (values, tiny) if layer is None else (values | by_layer[layer], tiny)
        for name, parts in _SUMS:
            if of.get(name) and of[name] == sum(of.get(part) or 0 for part in parts):
                tiny[name] = sum(made.get(part) or 0 for part in parts)
    for heads, width, expand in _MAMBA_HEADS:
        if type(tiny.get(heads)) is type(tiny.get(width)) is int and tiny.get(expand):
            inner = tiny.get("mamba_d_ssm") or int(tiny[expand] * tiny["hidden_size"])
            tiny[heads] = max(1, inner // tiny[width])
    return tiny


def _scale(values: dict[str, Any], outer: _Scale) -> _Scale:
    def first(pattern: str, otherwise: int) -> int:
        found = [v for n, v in values.items() if re.fullmatch(pattern, n) and isinstance(v, int) and v]
        return max(found, default=otherwise)

    lists = [len(v) for n, v in values.items() if n in ("layer_types", "layers_block_type") and isinstance(v, list)]
    layers_real = first(_LAYERS, max(lists, default=outer.layers_real))
    rotated = ROTARY_DIM if values.get("qk_rope_head_dim") else outer.rotated
    hidden_real, heads_real = first(_HIDDEN, outer.hidden_real), first(_HEADS, outer.heads_real)
    return _Scale(outer.layers, layers_real, hidden_real, heads_real, rotated)


class _Tokens:
    """Gives token ids beyond the tiny vocabulary others, from its end downwards."""

    def __init__(self) -> None:
        self._next = VOCABULARY

    def __call__(self, real: int) -> int:
        if real < VOCABULARY - 32:
            return real
        self._next = max(self._next - 1, VOCABULARY - 32)
        return self._next


def _tiny(name: str, value: Any, scale: _Scale, ids: _Tokens) -> Any:
    if isinstance(value, dict):
        return _tiny_dict(name, value, scale)
    if isinstance(value, list | tuple):
        return _tiny_list(name, list(value), scale, ids)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if _TOKEN.fullmatch(name):
        return ids(value)
    return _size(name, value, scale)


def _size(name: str, value: int, scale: _Scale) -> int:
    for pattern, tiny in _SIZES:
        if re.fullmatch(pattern, name):
            return tiny(value, scale) if value > 0 else value
    return value


def _tiny_dict(name: str, value: dict[Any, Any], scale: _Scale) -> dict[Any, Any]:
    if name in _KEPT:
        return value
    if value and all(str(key).isdigit() for key in value):  # by layer
        return {key: _shrunk(of, scale) for key, of in value.items() if int(key) < scale.layers}
    return _shrunk(value, scale)


def _tiny_list(name: str, values: list[Any], scale: _Scale, ids: _Tokens) -> list[Any]:
    numbers = bool(values) and all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    if numbers and _TOKEN.fullmatch(name):
        return [ids(value) for value in values]
    ascending = numbers and all(a < b for a, b in itertools.pairwise(values))
    if ascending and _LAYER_NUMBERS.fullmatch(name) and values[-1] < scale.layers_real:
        return [value for value in values if value < scale.layers]
    if len(values) == scale.layers_real:
        values = values[: scale.layers]
    if numbers and name == "mrope_section":
        return _sections(values, HEAD_DIM // 2)
    return [_tiny(name, value, scale, ids) for value in values] if numbers else copy.deepcopy(values)


def _sections(values: list[int], total: int) -> list[int]:
    tiny = [max(1, value * total // sum(values)) for value in values]
    tiny[0] += total - sum(tiny)
    return tiny


def tiny_model(found: type[PreTrainedModel], config: PreTrainedConfig, layers: int = LAYERS_MIN) -> PreTrainedModel:
    """A tiny instance of the class `found`: in fp32, in eval mode, with weights that depend on nothing but `config`.

    Args:
        config: of the real model.
        layers: so many of its first layers; more if the class needs several layers of a kind.

    Raises:
        ModelError: the class cannot be made that small.
    """
    for more in (layers, 2 * layers, 3 * layers):
        try:
            return _made(found, _as_by_default(found, tiny_config(config, more)))
        except Exception as error:  # transformers' classes raise anything for a config that they cannot be made from
            reason = error
    raise ModelError(f"config.json: no tiny {found.__name__} could be made: {one_line(reason)}") from reason


def _as_by_default(found: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """Where a class has attention of its own, that which users get: eager may differ, as with the ALiBi of Falcon."""
    if not found._can_set_attn_implementation():
        config._attn_implementation = None
    return config


def one_line(error: Exception) -> str:
    """What an error of unknown origin says."""
    said = re.sub(r"\s+", " ", str(error)).strip()[:REASON_CHARACTERS_MAX]
    return said or type(error).__name__


def _made(found: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: PreTrainedModel = found._from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32
        )
        model.requires_grad_(False)
        for module in model.modules():
            _fill(module)
    model.train(False)
    return model


def _fill(module: nn.Module) -> None:
    """Gives projections weights whose products are far from zero, so that activations can be told from each other."""
    if isinstance(module, nn.Linear | Conv1D):
        inputs = module.weight.shape[1 if isinstance(module, nn.Linear) else 0]
        module.weight.normal_(0, GAIN / max(1, inputs) ** 0.5)
        if module.bias is not None:
            module.bias.normal_(0, 0.5)
        return
    held = HELD.get(type(module).__name__)
    for name, parameter in module.named_parameters(recurse=False):
        if held is not None and name in held.learned:
            parameter.add_(torch.rand_like(parameter))  # so that layers differ
        elif parameter.dim() == 3 and min(parameter.shape[1:]) > 4:
            parameter.normal_(0, GAIN / min(parameter.shape[1:]) ** 0.5)
        elif parameter.dim() == 2 and isinstance(module, nn.Embedding):
            parameter.normal_(0, 1)
        elif parameter.dim() == 2 and name.endswith("bias"):
            parameter.normal_(0, 0.5)
