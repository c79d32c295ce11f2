"""Both ends of the range of transformers in pyproject.toml.

Models are derived, proven, imported and generate under each, and a store that was made under one runs under the other.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from repository import ROOT
from version_worker import FAMILIES

OLDEST, NEWEST = "5.2.0", "5.24.0"
# What these versions need in another version than the newest, or beside it. Everything else is what is installed.
NEEDS = {
    OLDEST: ["tokenizers==0.22.2", "huggingface_hub==1.33.0", "httpx", "httpcore", "sniffio", "h11", "anyio"],
    NEWEST: [],
}
PIP_INSTALL = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-compile")  # Python compiles what is imported
WORKER = ROOT / "tests" / "fixtures" / "version_worker.py"
TIMEOUT_S = 420

pytestmark = pytest.mark.slow


def test_the_range_in_pyproject_has_these_ends() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    major, minor = (int(part) for part in NEWEST.split(".")[:2])
    expected = f"transformers>={OLDEST.removesuffix('.0')},<{major}.{minor + 1}"
    named = [line for extra in project["optional-dependencies"].values() for line in extra if line.startswith("transf")]
    assert named
    assert set(named) == {expected}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each version."""
    folders = {}
    for version, needs in NEEDS.items():
        folder = folders[version] = tmp_path_factory.mktemp(f"transformers-{version}")
        pip = [sys.executable, *PIP_INSTALL, "--target", os.fspath(folder)]
        subprocess.run([*pip, f"transformers=={version}", *needs], check=True, capture_output=True, timeout=TIMEOUT_S)
    return folders


@pytest.fixture(scope="module")
def made(installed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The store that was made under each version."""
    stores = {version: tmp_path_factory.mktemp("made") / "store" for version in installed}
    for version, store in stores.items():
        assert_ok("make", version, installed[version], store)
    return stores


@pytest.mark.timeout(2 * TIMEOUT_S)
@pytest.mark.parametrize(("maker", "runner"), [(OLDEST, NEWEST), (NEWEST, OLDEST)])
def test_store_made_under_one_version_runs_under_the_other(
    maker: str, runner: str, installed: dict[str, Path], made: dict[str, Path]
) -> None:
    assert_ok("run", runner, installed[runner], made[maker])


def assert_ok(what: str, version: str, folder: Path, store: Path) -> None:
    """Each model was compared with transformers' own (make), or with the tokens of that time (run)."""
    path = os.pathsep.join(filter(None, [os.fspath(folder), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, os.fspath(WORKER), what, os.fspath(store)],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    said = [line for line in result.stdout.splitlines() if re.match(rf"{re.escape(version)} ", line)]
    assert said == [f"{version} {family} ok" for family in FAMILIES], result.stderr[-2000:]
