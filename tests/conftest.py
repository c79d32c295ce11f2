"""What all tests share: their order, and child processes of an import run in this process, as torch loads for seconds.

flashclient is imported before torch: it makes torch's idle threads sleep. If they spin, the processes of pytest-xdist
take the cores from each other, and tests that compute take six times as much CPU.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from run_here import run_here

import flashclient  # noqa: F401 (see above)
from weightd_proto.weightd_pb2 import ImportRequest, ImportResponse

ROOT = Path(__file__).parent
# Files that take longest, the longest first. They begin, so that no processor waits for one of them at the end.
LONGEST = (
    "flashclient/test_end_to_end.py",
    "scripts/test_soak.py",
    "scripts/test_demo_sparse.py",
    "scripts/test_bench_sharing.py",
    "flashclient/model/test_predict_mode.py",
    "scripts/test_bench_paper.py",
    "scripts/test_bench_memory_speed.py",
    "flashclient/test_transformers_versions.py",
    "repository/test_ray_serve.py",
    "flashclient/server/test_server.py",
    "scripts/test_scripts.py",
    "flashclient/test_retry_on_loss.py",
    "scripts/test_model_table.py",
    "scripts/test_evaluate_with_harness.py",
    "repository/test_readme.py",
    "scripts/test_demo_training.py",
    "scripts/test_bench_dense.py",
    "weightd/machine/test_pressure.py",
    "flashclient/generation/test_rehearsal.py",
    "flashclient/test_process_faults.py",
    "flashclient/test_hub_models.py",
    "flashclient/daemon/test_private.py",
    "scripts/test_demo_models.py",
    "flashclient/test_leaving.py",
    "weightd/importing/test_convert.py",
)
BEGINS = {ROOT / name: place for place, name in enumerate(LONGEST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: BEGINS.get(item.path, len(BEGINS)))


@pytest.fixture(autouse=True, scope="session")
def signals_are_not_ignored() -> None:
    """Restores SIGHUP and SIGINT. nohup and pytest-xdist ignore them, and processes that a test starts would too."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def import_in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weightd.importing.convert.child", client_here)
        patch.setattr("weightd.checkpoint.gguf_files._write_tokenizer", write_tokenizer_here)
        if "planted.store" in sys.modules:  # a test of benchmarks is among those that run
            patch.setattr("planted.store.run_import", run_import_here)
        yield


def run_import_here(*arguments: str) -> CompletedProcess[str]:
    from weightd import cli

    return run_here(cli.main, "weightd", "import", *arguments)


@contextmanager
def client_here() -> Iterator[Callable[[ImportRequest], ImportResponse]]:
    yield answer_here


def answer_here(request: ImportRequest) -> ImportResponse:
    """Recipes are derived once for each checkpoint, because tests import the same ones again and again."""
    from flashclient.generation.import_requests import answer

    return _derived(request.SerializeToString()) if request.HasField("derive") else answer(request)


@cache
def _derived(request: bytes) -> ImportResponse:
    from flashclient.generation.import_requests import answer

    return answer(ImportRequest.FromString(request))


def write_tokenizer_here(path: Path, folder: Path) -> None:
    from weightd.checkpoint.gguf_tokenizer import write_tokenizer

    write_tokenizer(path, folder)
