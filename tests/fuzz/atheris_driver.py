"""Runs a Python target under atheris: `atheris_driver.py TARGET [libFuzzer's options] [corpus folders]`."""

from __future__ import annotations

import gc
import sys
from types import FunctionType

import atheris
import checkpoint_targets
import file_targets
import grpc_target

TARGETS = checkpoint_targets.TARGETS | file_targets.TARGETS | grpc_target.TARGETS
MUTATORS = checkpoint_targets.MUTATORS | file_targets.MUTATORS | grpc_target.MUTATORS

# atheris' import hook does not see through the loader of an editable install.
INSTRUMENTED = ("weightd.", "flashclient.", "json.", "tomllib.")


def instrument() -> None:
    """Counts coverage in all functions of the modules under test."""
    for function in [found for found in gc.get_objects() if isinstance(found, FunctionType)]:
        if str(function.__module__).startswith(INSTRUMENTED):
            atheris.instrument_func(function)


def main() -> None:
    name = sys.argv.pop(1)
    instrument()
    atheris.Setup(sys.argv, TARGETS[name], **({"custom_mutator": MUTATORS[name]} if name in MUTATORS else {}))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
