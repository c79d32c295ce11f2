"""Names of a published checkpoint's tensors, as rules, and the tensors of transformers' checkpoint that they become.

A rule says where the rows of a tensor go: to one name, to several (fused projections), or nowhere. Names that no rule
matches stay as they are. Nothing is lost in silence: a rule that splits a tensor must place every row of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flashclient.errors import ModelError
from weightd_proto import weightd_pb2

Shapes = Mapping[str, Sequence[int]]
Rows = tuple[int, int]  # begin and end in a tensor's first dimension


@dataclass(frozen=True)
class Target:
    """A tensor of transformers' checkpoint.

    Attributes:
        name: a template as re.Match.expand() takes it.
        rows: ranges of the published tensor's rows, which are put together in this order; empty: all rows.
        columns: size of the last dimension in transformers' order. A tensor of three dimensions that has another size
            there has its last two dimensions swapped. 0: they are in order.
        swapped: the last two of three dimensions are swapped in transformers' order.
    """

    name: str
    rows: tuple[Rows, ...] = ()
    columns: int = 0
    swapped: bool = False


@dataclass(frozen=True)
class Rename:
    """What becomes of tensors whose whole name matches the regular expression `pattern`."""

    pattern: str
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Omission:
    """Tensors, by a regular expression of their whole name, that the text model does not use."""

    pattern: str
    reason: str


def rename(pattern: str, *targets: str | Target) -> Rename:
    return Rename(pattern, tuple(Target(target) if isinstance(target, str) else target for target in targets))


def split_rows(names: Mapping[str, int]) -> tuple[Target, ...]:
    """Targets that take so many rows each, one after the other."""
    targets, begin = [], 0
    for name, rows in names.items():
        targets.append(Target(name, ((begin, begin + rows),)))
        begin += rows
    return tuple(targets)


def renamed(
    renames: Iterable[Rename], omissions: Iterable[Omission], shapes: Shapes
) -> tuple[dict[str, weightd_pb2.TensorSource], list[weightd_pb2.LeftOut]]:
    """The source of each tensor of transformers' checkpoint, and the tensors that are left out.

    Args:
        shapes: of the published checkpoint's tensors, by name.

    Raises:
        ModelError: two tensors go to the same name, or a tensor has other rows than its rule places.
    """
    rules: list[Rename | Omission] = [*omissions, *renames]
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    sources: dict[str, weightd_pb2.TensorSource] = {}
    left_out: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        match, rule = next(
            ((found, rule) for pattern, rule in compiled if (found := pattern.fullmatch(name))), (None, None)
        )
        if isinstance(rule, Omission):
            left_out.setdefault(rule.reason, []).append(name)
            continue
        if match is None or rule is None:
            placed = {name: weightd_pb2.TensorSource(tensor=name)}
        else:
            _check_rows(name, rule, shape)
            placed = {match.expand(target.name): _source(name, target, shape) for target in rule.targets}
        for target_name, source in placed.items():
            if target_name in sources:
                raise ModelError(f"the checkpoint holds {target_name} under two names, one of them {name}")
            sources[target_name] = source
    return sources, [weightd_pb2.LeftOut(reason=reason, tensors=names) for reason, names in left_out.items()]


def _check_rows(name: str, rule: Rename, shape: Sequence[int]) -> None:
    ranges = sorted(rows for target in rule.targets for rows in target.rows)
    if not ranges:
        return
    ends = [0, *(end for _, end in ranges)]
    if [begin for begin, _ in ranges] != ends[:-1] or not shape or shape[0] != ends[-1]:
        raise ModelError(f"{name} has shape {list(shape)}, but by config.json it has {ends[-1]} rows")


def _source(name: str, target: Target, shape: Sequence[int]) -> weightd_pb2.TensorSource:
    whole = weightd_pb2.TensorSource(tensor=name)
    pieces = [
        weightd_pb2.TensorSource(slice=weightd_pb2.Slice(of=whole, dim=0, begin=begin, end=end, step=1))
        for begin, end in target.rows
    ] or [whole]
    if len(pieces) > 1:
        pieces = [weightd_pb2.TensorSource(concatenated=weightd_pb2.Concatenated(dim=0, parts=pieces))]
    swapped = target.swapped or (target.columns and len(shape) == 3 and shape[2] != target.columns)
    if not swapped:
        return pieces[0]
    return weightd_pb2.TensorSource(transposed=weightd_pb2.Transposed(of=pieces[0], dim0=1, dim1=2))
