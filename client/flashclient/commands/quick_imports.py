"""Imports of torch and transformers without what only compilers, several machines and training need.

At import transformers uses their names as decorators and in checks, so these are replaced while it is imported. Nothing
is replaced afterwards: whoever then asks for the compiler gets it. This is for commands, whose process is their own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
OPERATOR = f"{COMPILER}._trace_wrapped_higher_order_op"
PREFIX = "models."
CHECKS = ("is_accelerate_available", "is_scipy_available", "is_torch_distributed_available")


class _Decorators(ModuleType):
    """Stands for a module of decorators, which change nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unchanged


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    return function if function is not None else _unchanged


class _LateOperator:
    """The compiler's own class, imported where it is made."""

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        return importlib.import_module(OPERATOR).TransformGetItemToIndex(*arguments, **named)


def _no() -> bool:
    return False


@contextmanager
def quick_imports() -> Iterator[None]:
    """Inside the `with` statement transformers may be imported, and nothing may run."""
    import torch.compiler

    if "transformers" in sys.modules or COMPILER in sys.modules:
        yield
        return
    from flashclient.torch_state import never_compile

    never_compile()
    compiler: Any = _Decorators(COMPILER)
    operator: Any = ModuleType(OPERATOR)
    compiler.__path__ = []
    operator.TransformGetItemToIndex = _LateOperator
    stand_ins = {COMPILER: compiler, OPERATOR: operator}
    with ExitStack() as replaced:
        sys.modules.update(stand_ins)
        replaced.callback(_remove, stand_ins)
        for name in ("disable", "allow_in_graph"):
            _replace(torch.compiler, name, _unchanged, replaced)
        import transformers.utils
        from transformers.utils import import_utils

        for name in CHECKS:
            _replace(transformers.utils, name, _no, replaced)
            _replace(import_utils, name, _no, replaced)
        _replace(import_utils, "define_import_structure", _read_once(import_utils), replaced)
        yield


def _read_once(import_utils: Any) -> Any:
    """transformers' function that reads the sources of all models for their names: it is called twice for them."""
    read: Any = getattr(import_utils, "define_import_structure", None)
    models = Path(import_utils.__file__).parents[1] / "models"

    def structure(path: Any, prefix: str | None = None) -> Any:
        if prefix is not None or Path(path) != models / "__init__.py":
            return read(path, prefix=prefix)
        known = read(models, prefix="models")  # which was read by the first call
        return {
            needed: {name.removeprefix(PREFIX): has for name, has in files.items() if name.startswith(PREFIX)}
            for needed, files in known.items()
        }

    return structure


def _remove(stand_ins: dict[str, ModuleType]) -> None:
    for name, module in stand_ins.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]


def _replace(module: Any, name: str, value: Any, replaced: ExitStack) -> None:
    """Until the end of `replaced`. Other versions may lack the name."""
    if hasattr(module, name):
        replaced.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)
