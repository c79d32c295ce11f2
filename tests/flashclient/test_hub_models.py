"""Models by their name on the hub: imported on first use, and found in the store from then on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint, write_torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from flashclient import FlashClient
from flashclient.errors import StartError

IDS = [[3, 4, 5, 6]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer(make_checkpoint("llama", tmp_path / "published", layers=1))
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with server.running():
        yield server


def weightd(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "weightd", *arguments], capture_output=True, text=True, check=False
    )


def test_model_of_the_hub_is_imported_once_and_replaced_by_a_newer_revision(hub: HubServer, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with FlashClient("org/tiny", store=store) as client:
        expected = client.generate(IDS, max_new_tokens=8, do_sample=False)
        assert client.record.name == "tiny"
        assert client.record.source == "org/tiny"
    hub.answer = 500
    with FlashClient("org/tiny", store=store) as client:
        assert client.generate(IDS, max_new_tokens=8, do_sample=False) == expected
    hub.answer = 0
    weights = hub.folder / "model.safetensors"
    save_file({name: value * 1.5 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    updated = weightd("import", "org/tiny", "--store", str(store), "--update", "--json")
    assert json.loads(updated.stdout)["done"] == "replaced", updated.stderr
    again = weightd("import", "org/tiny", "--store", str(store), "--update", "--json")
    assert json.loads(again.stdout)["done"] == "kept", again.stderr


def test_model_that_is_current_is_not_downloaded_to_know_it(hub: HubServer, tmp_path: Path) -> None:
    """Also where the cache was emptied after the import."""
    store = ("--store", str(tmp_path / "store"), "--update", "--json")
    assert json.loads(weightd("import", "org/tiny", *store).stdout)["done"] == "imported"
    shutil.rmtree(tmp_path / "hf")
    hub.requests.clear()
    assert json.loads(weightd("import", "org/tiny", *store).stdout)["done"] == "kept"
    assert not hub.requests


def test_model_that_the_hub_lacks_is_one_line(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(
        StartError, match=r"cannot import org/other: no file or folder org/other, and http.* no such model"
    ):
        FlashClient("org/other", store=tmp_path / "store")
    refused = weightd("import", "org/other", "--store", str(tmp_path / "store"))
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("weightd: no file or folder org/other, and http://")
    assert not (tmp_path / "store").exists()


def test_download_shows_its_progress_on_a_terminal_only(hub: HubServer, tmp_path: Path) -> None:
    done = weightd("import", "org/tiny", "--store", str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_terminal_shows_how_far_a_download_is(hub: HubServer, tmp_path: Path) -> None:
    terminal, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-P", "-m", "weightd", "import", "org/tiny", "--store", str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs) as child:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # EIO: the child has ended
            while piece := os.read(terminal, 4096):
                shown += piece
    os.close(terminal)
    assert child.returncode == 0, shown.decode()
    assert b"model.safetensors: 100%" in shown
    assert b"importing: 100%" in shown
    assert b"Reconstruct" not in shown


def test_torch_files_come_where_a_model_has_no_others(hub: HubServer, tmp_path: Path) -> None:
    state = load_file(hub.folder / "model.safetensors")
    (hub.folder / "model.safetensors").unlink()
    write_torch({name: torch.clone(value) for name, value in state.items()}, hub.folder)
    done = weightd("import", "org/tiny", "--store", str(tmp_path / "store"), "--name", "mine")
    assert done.stdout.startswith("imported mine: "), done.stderr
