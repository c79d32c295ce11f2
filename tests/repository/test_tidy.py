"""Habits that no linter knows: sizes of functions and files, the layout, no unfinished words."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
from repository import ROOT

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 500
PRIVATE_METHODS_MAX = 20  # of a class
CLASS_SOURCES_MAX = 2  # .cpp files that define member functions of a class
FOLDER_NOUNS_MAX = 14  # modules of a package, or headers of a native folder
TOP_LEVEL = {".ci", "client", "deploy", "proto", "scripts", "tests", "weightd"}
CODE = {".py", ".h", ".cpp", ".proto", ".sh"}
VAGUE_NAMES = re.compile(r"(^|_)(utils?|common|helpers?|manager|base|misc)(_|$)")
UNFINISHED = re.compile(r"\b(TO" + "DO|FIX" + "ME|X" + "XX)\b")


def tracked() -> list[Path]:
    """Files of the repository, without those that a build left."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


FILES = tracked()
SOURCES = [path for path in FILES if path.suffix in CODE or path.parent == ROOT / "scripts"]
PYTHON = [path for path in SOURCES if path.suffix == ".py"]
MODULES = [path for path in PYTHON if not path.name.startswith("test_")]
PRODUCT = [path for path in MODULES if path.is_relative_to(ROOT / "weightd") or path.is_relative_to(ROOT / "client")]
NATIVE = [path for path in SOURCES if path.suffix == ".cpp"]
HEADERS = [path for path in SOURCES if path.suffix == ".h"]
CPP = [*HEADERS, *NATIVE]
CPP_DIALECT = {
    "size_t and uint32_t, not std::size_t and std::uint32_t": re.compile(r"\bstd::(?:size_t|u?int\d+_t)\b"),
    "i++, not ++i, where the value is not used": re.compile(r"(?:^\s*|; )(?:\+\+|--)\w"),
    "1U, not 1u": re.compile(r"\b(?:0x[\da-f']+|\d[\d']*)u\b"),
    "constexpr variables in capitals": re.compile(r"\bconstexpr (?!static )[\w:<>]+ (?:const )?[a-z]\w*(?: =|\{|\[)"),
}
CPP_CONDITION = re.compile(r"^\s*(?:\} )?(?:else )?(?:if|for|while)(?: constexpr)? \(")
CPP_LITERAL = re.compile(r""" "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])' """, re.VERBOSE)


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_the_layout_has_no_other_folder() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES if path.parent != ROOT} <= TOP_LEVEL


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_files_are_short_and_finished(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= FILE_LINES_MAX
    assert not UNFINISHED.search(text)
    assert not VAGUE_NAMES.search(path.stem)


@pytest.mark.parametrize("path", PYTHON, ids=names(PYTHON))
def test_python_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_modules_say_what_they_are(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", NATIVE, ids=names(NATIVE))
def test_native_functions_are_short(path: Path) -> None:
    """clang-format puts a function's end on a line of its own, as deep as its beginning."""
    functions = r"^(?!namespace|class|struct)(?:[\w:~].*|template.*\n.*)\{\n((?:(?!\}).*\n)*)\}"
    for body in re.findall(functions, path.read_text(), re.MULTILINE):
        assert body.count("\n") <= FUNCTION_LINES_MAX, body[:80]


@pytest.mark.parametrize("path", PRODUCT, ids=names(PRODUCT))
def test_python_classes_have_few_private_methods(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            functions = [each.name for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
            private = [name for name in functions if name.startswith("_") and not name.endswith("__")]
            assert len(private) <= PRIVATE_METHODS_MAX, f"{node.name} has {len(private)} private methods"


@pytest.mark.parametrize("path", HEADERS, ids=names(HEADERS))
def test_native_classes_have_few_private_methods(path: Path) -> None:
    """clang-format indents members by four spaces, and what goes on in a second line by more."""
    for name, body in re.findall(r"^class (\w+)[^;]*?\{\n(.*?)^\};", path.read_text(), re.MULTILINE | re.DOTALL):
        private = re.findall(r"^  private:\n(.*?)(?=^  \w+:$|\Z)", body, re.MULTILINE | re.DOTALL)
        methods = re.findall(r"^    [\w~][^(={\n]*\b\w+\(", "".join(private), re.MULTILINE)
        assert len(methods) <= PRIVATE_METHODS_MAX, f"{name} has {len(methods)} private methods"


@pytest.mark.parametrize("path", CPP, ids=names(CPP))
def test_cpp_has_one_dialect(path: Path) -> None:
    lines = [line.split("//")[0] for line in path.read_text().splitlines()]
    for rule, other in CPP_DIALECT.items():
        wrong = [line.strip() for line in lines if other.search(line)]
        assert not wrong, rule


@pytest.mark.parametrize("path", CPP, ids=names(CPP))
def test_cpp_bodies_on_lines_of_their_own_have_braces(path: Path) -> None:
    lines = [CPP_LITERAL.sub("", line).split("//")[0].rstrip() for line in path.read_text().splitlines()]
    for first, line in enumerate(lines):
        assert not re.fullmatch(r"\s*(?:\} )?else", line)
        if CPP_CONDITION.match(line):
            assert after_condition("\n".join(lines[first:])).lstrip(" ")[:1] != "\n", line.strip()


def after_condition(code: str) -> str:
    """What follows the parentheses that open first."""
    depth = 0
    for index, letter in enumerate(code):
        depth += (letter == "(") - (letter == ")")
        if letter == ")" and depth == 0:
            return code[index + 1 :]
    return ""


NOUNS = [path for path in (*PRODUCT, *HEADERS) if path.parts[len(ROOT.parts)] in ("weightd", "client")]
NOUN_FOLDERS = sorted({path.parent for path in NOUNS})


@pytest.mark.parametrize("folder", NOUN_FOLDERS, ids=names(NOUN_FOLDERS))
def test_folders_have_few_nouns(folder: Path) -> None:
    """A noun is a module, or a header with its sources: reader.h has reader.cpp and reader_threads.cpp."""
    nouns = {path.stem for path in NOUNS if path.parent == folder}
    assert len(nouns - {"__init__", "__main__"}) <= FOLDER_NOUNS_MAX
    sources = {path.stem for path in NATIVE if path.parent == folder and not path.stem.startswith("bindings")}
    assert not {stem for stem in sources if not any(f"{stem}_".startswith(f"{noun}_") for noun in nouns)}


@pytest.mark.parametrize("top", ["weightd", "client"])
def test_native_classes_lie_in_few_sources(top: str) -> None:
    sources: dict[str, set[str]] = {}
    for path in (each for each in NATIVE if each.is_relative_to(ROOT / top / "native")):
        for name in re.findall(r"^\w[^(\n]*?\b([A-Z]\w*)::~?\w+\(", path.read_text(), re.MULTILINE):
            sources.setdefault(name, set()).add(path.name)
    spread = {name: sorted(files) for name, files in sources.items() if len(files) > CLASS_SOURCES_MAX}
    assert not spread
