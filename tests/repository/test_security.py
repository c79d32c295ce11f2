"""Everything that SECURITY.md promises is shown by a test."""

from __future__ import annotations

import ast
import re

import checkpoint_targets
import file_targets
import grpc_target
import pytest
from repository import ROOT

SECURITY = (ROOT / "SECURITY.md").read_text()
ROWS = [
    line for line in SECURITY.splitlines() if line.startswith("| ") and not line.startswith(("| attack", "| fault"))
]
SHOWN = sorted(set(re.findall(r"`((?:tests|scripts)/[^`]+[. ][^`]+)`", SECURITY)))
FUZZ_TARGETS = {
    *checkpoint_targets.TARGETS,
    *file_targets.TARGETS,
    *grpc_target.TARGETS,
    *(path.stem for path in (ROOT / "tests" / "fuzz").glob("*_fuzz.cpp")),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_it_names_is_there(name: str) -> None:
    command, _, target = name.partition(" ")
    path, _, test = command.partition("::")
    text = (ROOT / path).read_text()
    assert not target or target in FUZZ_TARGETS
    if path.endswith(".cpp"):
        assert re.search(rf"^TEST(_F)?\(\w+, {test}\)", text, re.MULTILINE)
    elif test:
        assert test in {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[1].strip()[:40] for row in ROWS])
def test_each_row_is_shown_by_something(row: str) -> None:
    assert row.split("|")[-2].count("`") >= 2


def test_every_fuzz_target_shows_something() -> None:
    assert {name.split()[1] for name in SHOWN if name.startswith("scripts/fuzz ")} == FUZZ_TARGETS - {"config_file"}
