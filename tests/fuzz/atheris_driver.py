"""Runs a Python target under atheris: `atheris_driver.py TARGET [libFuzzer's options] [corpus folders]`."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import FunctionType

import atheris
import checkpoint_targets
import file_targets
import grpc_target
from conftest import rehearse_here

from weightd.importing import rehearsal
from weightd_proto import weightd_pb2

TARGETS = checkpoint_targets.TARGETS | file_targets.TARGETS | grpc_target.TARGETS
MUTATORS = checkpoint_targets.MUTATORS | file_targets.MUTATORS | grpc_target.MUTATORS

# atheris' import hook does not see through the loader of an editable install.
INSTRUMENTED = ("weightd.", "flashclient.", "json.", "tomllib.")


def instrument() -> None:
    """Counts coverage in all functions of the modules under test."""
    for function in [found for found in gc.get_objects() if isinstance(found, FunctionType)]:
        if str(function.__module__).startswith(INSTRUMENTED):
            atheris.instrument_func(function)


def rehearse(record: weightd_pb2.Model, files: Path) -> str:
    """Runs the rehearsal of an import, usually a child process, in this process, where the fuzzer's limits apply.

    Any exception would end the child, and the import would fail with one line.
    """
    try:
        return rehearse_here(record, files)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    rehearsal.__dict__["_rehearse"] = rehearse
    name = sys.argv.pop(1)
    instrument()
    atheris.Setup(sys.argv, TARGETS[name], **({"custom_mutator": MUTATORS[name]} if name in MUTATORS else {}))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
