"""Folders and sockets that the caller may not use: one line names the path and the remedy."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from daemon import serving
from tiny_store import write_model

from flashclient.daemon.channel import Connection

# Root may do everything; so may no one else.
PREFIX = () if os.geteuid() else ("setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--")
OWN = r"permission denied: run it as the owner, change the mode \(`ls -ld` shows both\), or name another folder"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("weightd --store S --dram 64MiB --listen unix:R/w.sock", rf"weightd: R/w\.sock\.data: {OWN}"),
        ("weightd ls --store C", rf"weightd: C/catalog\.mdb: {OWN}"),
        ("weightd verify --store C", rf"weightd: C/catalog\.mdb: {OWN}"),
        ("weightd --store C --dram 64MiB --listen unix:S/w.sock", rf"weightd: C/catalog\.mdb: {OWN}"),
        ("weightd import S --store R/new", rf"weightd: R/new: {OWN}"),
        (
            "flashclient generate tiny Hi --store C",
            r"flashclient: cannot use the store C: C/\S+: permission denied: use it as its owner, or name another",
        ),
    ],
)
def test_what_may_not_be_used_is_named(tmp_path: Path, command: str, said: str) -> None:
    folders = {letter: str(tmp_path / letter) for letter in "SRC"}  # a store, a folder to read, a closed store
    write_model(Path(folders["S"]))
    write_model(Path(folders["C"]))
    Path(folders["R"]).mkdir(mode=0o555)
    Path(folders["C"]).chmod(0)
    (tmp_path / "tiny").mkdir()  # it may be meant, too, so the store is looked into
    words = [re.sub(r"\b[SRC]\b", lambda found: folders[found[0]], word) for word in command.split()]
    command_line = [*PREFIX, sys.executable, "-P", "-m", *words]
    done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    Path(folders["C"]).chmod(0o700)
    told = done.stderr
    for letter, folder in folders.items():
        told = told.replace(folder, letter)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(said + r"\n", told), told


def test_a_socket_of_others_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "store")
    with serving(tmp_path / "store") as daemon:
        code = f"from flashclient.daemon.channel import Connection; Connection({daemon.address!r}, 1.0)"
        path = Path(daemon.address.removeprefix("unix:"))
        path.chmod(0)
        command = [*PREFIX, sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        path.chmod(0o600)
        Connection(daemon.address, 5.0).close()
    assert re.search(rf"NoDaemonError: cannot use unix:{path}: permission denied: .*; join the group, or", done.stderr)
