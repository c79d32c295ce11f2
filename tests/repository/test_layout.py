"""Which package may import which: those named in its line of the table, and nothing else.

A package is named after everything that it may import, so the table has no circle. A name without a dot is a module
directly in the top package.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

TABLE = {
    "weightd": """
        errors:
        sizes: errors
        closing:
        flags: errors
        log:
        disk: errors sizes closing
        store: errors sizes closing disk
        checkpoint: errors sizes disk
        importing: errors sizes disk store checkpoint
        machine: errors sizes flags store
        gateway: errors flags
        watching: errors sizes flags log gateway
        serving: errors sizes flags log disk store machine gateway watching
        planning: errors sizes flags disk store checkpoint importing machine serving
        cli: errors sizes flags log store checkpoint importing machine watching serving planning
        __main__: cli
    """,
    "flashclient": """
    errors:
    garbage:
    interrupts:
    memory_limits:
    standard_streams:
    torch_state:
    turns: errors
    daemon: errors
    source: errors daemon
    kernels: errors
    model: errors garbage torch_state turns daemon source kernels
    tensors: errors
    recipes: errors source model tensors
    generation: errors torch_state source kernels model tensors recipes
    batching: errors torch_state kernels model generation
    calibration: errors memory_limits daemon source kernels model
    options: errors daemon
    client: errors standard_streams torch_state turns daemon source model generation options
    server: errors generation batching client
    commands: errors garbage interrupts standard_streams torch_state daemon generation batching calibration options \
        client server
    cli: errors interrupts standard_streams commands
    __main__: interrupts cli
    __init__: garbage client
    """,
}
# The modules of the client that weightd may import: code that both need, and the client that `weightd top` is.
CLIENT_IN_WEIGHTD = {
    "__main__": {"interrupts"},
    "cli": {"commands", "daemon", "errors", "interrupts", "standard_streams"},
    "flags": {"commands"},
    "gateway": {"standard_streams"},
    "machine": {"memory_limits", "standard_streams"},
    "planning": {"memory_limits", "standard_streams"},
    "watching": {"commands", "daemon", "errors", "standard_streams"},
}
ARCHITECTURE_LINES_MAX = 150
FOLDERS = {"weightd": ROOT / "weightd" / "weightd", "flashclient": ROOT / "client" / "flashclient"}
NATIVE = {
    "weightd": ["device", "bundle", "pool", "memory", "engine", "session", "service"],
    "client": ["formats", "vectors", "kernels", "ffn", "predict", "experts", "tables", "ring"],
}


def allowed(top: str) -> dict[str, set[str]]:
    lines = [line.strip() for line in TABLE[top].strip().splitlines()]
    return {name: set(names.split()) for name, names in (line.split(":") for line in lines)}


def imports(path: Path, top: str) -> Iterator[str]:
    """First names below `top` that the module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == top:
            names = [f"{top}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith(f"{top}."))


def modules(top: str) -> Iterator[tuple[str, Path]]:
    for path in sorted(FOLDERS[top].rglob("*.py")):
        yield path.relative_to(FOLDERS[top]).parts[0].removesuffix(".py"), path


@pytest.mark.parametrize("top", TABLE)
def test_packages_import_only_those_below_them(top: str) -> None:
    table = allowed(top)
    wrong = {
        f"{path.relative_to(FOLDERS[top])} imports {name}"
        for package, path in modules(top)
        for name in imports(path, top)
        if name not in {*table.get(package, set()), package, "_native"}
    }
    assert not wrong


@pytest.mark.parametrize("top", TABLE)
def test_the_table_names_every_package_after_those_that_it_imports(top: str) -> None:
    table = allowed(top)
    assert {package for package, _ in modules(top)} <= {*table, "__init__"}
    seen: set[str] = set()
    for package, names in table.items():
        assert names <= seen, package
        seen.add(package)


@pytest.mark.parametrize("top", TABLE)
def test_modules_of_a_package_import_each_other_without_a_circle(top: str) -> None:
    """Imports inside functions count, too: they would only hide a circle."""
    edges: dict[str, set[str]] = {}
    for _, path in modules(top):
        name = ".".join((top, *path.relative_to(FOLDERS[top]).with_suffix("").parts))
        edges[name] = {
            module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module is not None
            for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        }
    while leaves := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges


@pytest.mark.parametrize("top", NATIVE)
def test_native_folders_include_only_those_below_them(top: str) -> None:
    rank = {name: number for number, name in enumerate(NATIVE[top])}
    for path in sorted((ROOT / top / "native").glob("*/*")):
        for included in re.findall(r'#include "(\w+)/', path.read_text()):
            assert rank[included] <= rank[path.parent.name], f"{path.relative_to(ROOT)} includes {included}"


def test_the_client_never_imports_the_daemon() -> None:
    for path in (ROOT / "client").rglob("*.py"):
        assert "weightd" not in {name.split(".")[0] for name in imported(path)}, path


def test_the_daemon_imports_little_of_the_client() -> None:
    for package, path in modules("weightd"):
        assert set(imports(path, "flashclient")) <= CLIENT_IN_WEIGHTD.get(package, set()), path


def test_what_serves_never_imports_torch() -> None:
    folders = ("disk", "store", "machine", "gateway", "watching", "serving")
    for folder in folders:
        for path in (FOLDERS["weightd"] / folder).glob("*.py"):
            assert not {"torch", "transformers"} & {name.split(".")[0] for name in imported(path)}, path


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module


def test_the_architecture_is_one_page_that_names_every_folder() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert text.count("\n") <= ARCHITECTURE_LINES_MAX
    folders = {path.parent.name for top in FOLDERS for _, path in modules(top)}
    folders |= {path.parent.name for top in NATIVE for path in (ROOT / top / "native").glob("*/*")}
    missing = {name for name in folders if not re.search(rf"`[^`]*\b{name}/`", text)}
    assert not missing


# Names that mean the same thing on both sides (a Session has two ends), or in a message and in the code that reads it.
SHARED_NAMES = {
    "Activation", "BusyError", "Codes", "CorruptBundle", "CorruptionError", "Dtype", "Encoding",
    "Lane", "Metric", "Model", "ReadQueue", "Session", "Sixteen", "SixteenAbove",
}  # fmt: skip
CLASS = re.compile(r"^(?:class|struct|enum(?: class)?) (\w+)(?: final)?(?: : [^;{]*)?\s*\{", re.MULTILINE)


def defined_classes() -> Iterator[tuple[str, str]]:
    """Classes of the product and the file, without its suffix, that defines each. Not those inside of another."""
    for folder in (*FOLDERS.values(), ROOT / "proto"):
        for path in folder.rglob("*.py"):
            names = (node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef))
            yield from ((name, str(path.with_suffix(""))) for name in names)
    for folder in (ROOT / "weightd" / "native", ROOT / "client" / "native", ROOT / "proto"):
        for path in (*folder.rglob("*.h"), *folder.rglob("*.cpp")):
            yield from ((name, str(path.with_suffix(""))) for name in CLASS.findall(path.read_text()))
    messages = re.findall(r"^message (\w+)", (ROOT / "proto" / "weightd.proto").read_text(), re.MULTILINE)
    yield from ((name, "weightd.proto") for name in messages)


def test_a_class_name_means_one_thing() -> None:
    where: dict[str, set[str]] = {}
    for name, path in defined_classes():
        where.setdefault(name, set()).add(path)
    assert {name: paths for name, paths in where.items() if len(paths) > 1 and name not in SHARED_NAMES} == {}
