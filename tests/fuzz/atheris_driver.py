"""Runs a Python target under atheris: `atheris_driver.py TARGET [libFuzzer's options] [corpus folders]`."""

from __future__ import annotations

import gc
import sys
from types import FunctionType

import atheris
from file_targets import TARGETS
from grpc_target import grpc_messages

# atheris' import hook does not see through the loader of an editable install.
INSTRUMENTED = ("weightd.", "flashclient.", "json.", "tomllib.")


def instrument() -> None:
    """Counts coverage in all functions of the modules under test."""
    for function in [found for found in gc.get_objects() if isinstance(found, FunctionType)]:
        if str(function.__module__).startswith(INSTRUMENTED):
            atheris.instrument_func(function)


def main() -> None:
    target = (TARGETS | {"grpc_messages": grpc_messages})[sys.argv.pop(1)]
    instrument()
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
