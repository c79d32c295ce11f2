"""Where the tensors of a model of transformers lie in a GGUF file.

gguf's own table (tensor_mapping.py) says which name llama.cpp's converter gives to the modules of each architecture.
It is asked for the name of every tensor of the model. What the converter does to matrices, it does by the kind of
module: Conv1D is transposed, and experts that share one tensor are divided into gate and up.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flashclient.errors import ModelError
from flashclient.tensors.places import Interleaved, Piece, Place, Shape, join, stack, tensors_of

EXPERTS = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:.+\.)?experts\.(gate_up_proj|down_proj)(_bias)?")
SCORE_BIAS = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:.+\.)?e_score_correction_bias")


def gguf_places(model: PreTrainedModel, architecture: str, shapes: Mapping[str, Shape]) -> dict[str, Place]:
    """The place of each tensor of `model`, by its name there. Tensors of the file that it lacks keep their names.

    Args:
        model: on the meta device.
        architecture: general.architecture of the file.
        shapes: of the file's tensors, by name.

    Raises:
        ModelError: the installed gguf does not know the architecture.
    """
    name_of = _names(architecture, model.config.num_hidden_layers)
    modules = dict(model.named_modules())
    places: dict[str, Place] = {}
    for name in model.state_dict():
        parts = _parts_in_file(name, name_of, shapes)
        if not parts:
            continue  # tied, or missing: find_tensors() decides
        module = name.rpartition(".")[0]
        if EXPERTS.fullmatch(name):
            places[name] = _experts(parts, modules[module])
        elif isinstance(modules[module], Conv1D) and name.endswith(".weight"):
            places[name] = parts[0].permuted((1, 0))
        elif module.endswith("query_key_value") and architecture in FUSED:
            places[name] = _by_group(parts[0], *FUSED[architecture](model.config))
        else:
            places[name] = parts[0]
    used = {found for place in places.values() for found in tensors_of(place)}
    return places | {name: Piece.whole(name, shape) for name, shape in shapes.items() if name not in used}


def _experts(parts: Sequence[Place], module: nn.Module) -> Place:
    """As the class has them: rows of gate and up after each other or in turn, matrices as they are or transposed."""
    rows = 1
    transposed = getattr(module, "is_transposed", False) and len(parts[0].shape) == 3
    placed: list[Place] = [part.permuted((0, 2, 1)) if transposed else part for part in parts]
    if transposed:
        rows = 2
    if len(placed) == 1:
        return placed[0]
    return join(placed, rows) if getattr(module, "is_concatenated", True) else Interleaved(rows, tuple(placed))


def _names(architecture: str, layers: int) -> Callable[[str], str | None]:
    import gguf

    arch = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise ModelError(f"the installed gguf does not know the architecture {architecture!r}: upgrade it")
    names = gguf.get_tensor_name_map(arch, layers)

    def name_of(module: str) -> str | None:
        """Some are listed without the prefix of the base model."""
        parts = module.split(".")
        found = (names.get_name(".".join(parts[begin:])) for begin in range(len(parts)))
        return next((name for name in found if name is not None), None)

    return name_of


def _parts_in_file(name: str, name_of: Callable[[str], str | None], shapes: Mapping[str, Shape]) -> list[Place]:
    """What of the file makes up a tensor of the model, part by part."""
    found = next((found for found in _candidates(name, name_of) if found in shapes), None)
    if found is not None:
        return [Piece.whole(found, shapes[found])]
    experts = EXPERTS.fullmatch(name)
    if experts is None:
        return []
    parts = ("gate", "up") if experts[2] == "gate_up_proj" else ("down",)
    places = [_of_experts(f"blk.{experts[1]}.ffn_{part}", "bias" if experts[3] else "weight", shapes) for part in parts]
    return [place for place in places if place is not None] if all(places) else []


def _of_experts(module: str, kind: str, shapes: Mapping[str, Shape]) -> Place | None:
    """One tensor for all experts, or one for each, as files of before April 2024 have them."""
    whole = f"{module}_exps.{kind}"
    if whole in shapes:
        return Piece.whole(whole, shapes[whole])
    named = (f"{module}.{expert}.{kind}" for expert in itertools.count())
    apart = [Piece.whole(one, shapes[one]) for one in itertools.takewhile(shapes.__contains__, named)]
    return stack(apart, 0) if apart else None


def _candidates(name: str, name_of: Callable[[str], str | None]) -> Iterator[str]:
    bias = SCORE_BIAS.fullmatch(name)
    if bias is not None:
        yield f"blk.{bias[1]}.exp_probs_b.bias"
    module, _, kind = name.rpartition(".")
    if kind in ("weight", "bias"):
        found = name_of(module)
        if found is not None:
            yield f"{found}.{kind}"
    else:
        found = name_of(name)
        if found is not None:
            yield from (f"{found}.weight", found)


# Fused projections whose rows llama.cpp orders by query, key and value, and transformers by groups of heads


def _bloom(config: Any) -> tuple[int, tuple[int, ...]]:
    size = config.hidden_size // config.n_head
    return config.n_head, (size, size, size)


def _falcon(config: Any) -> tuple[int, tuple[int, ...]]:
    size = config.hidden_size // config.num_attention_heads
    groups = 1 if config.multi_query else config.num_kv_heads
    return groups, (config.num_attention_heads // groups * size, size, size)


# The number of groups, and the rows of query, key and value in each.
FUSED: dict[str, Callable[[Any], tuple[int, tuple[int, ...]]]] = {"bloom": _bloom, "falcon": _falcon}


def _by_group(place: Place, groups: int, rows: Sequence[int]) -> Place:
    begins = [groups * sum(rows[:part]) for part in range(len(rows))]
    pieces = [
        place.sliced(0, begin, begin + count)
        for group in range(groups)
        for begin, count in ((begins[part] + group * rows[part], rows[part]) for part in range(len(rows)))
    ]
    return join(pieces, 0)
