"""Tables: names, and what has bundles of its own. See Model.tables in weightd.proto."""

from __future__ import annotations

from weightd_proto.weightd_pb2 import Model

ROW = "row"  # the one part of a table's bundles
WEIGHT = "weight"  # the parameter of an embedding that holds its rows


def table_name(model: str, module: str) -> str:
    return f"{model}/{module}"


def model_of(name: str) -> str:
    """The name of the model that a table belongs to. A model's own name has no slash."""
    return name.partition("/")[0]


def module_of(name: str) -> str:
    """The module of a table; empty for the name of a model."""
    return name.partition("/")[2]


def with_tables(model: Model) -> list[Model]:
    """The records that have bundles of their own."""
    return [model, *model.tables]
