"""How a weightd is found: sockets in folders of any name, proxies in the environment, damaged lock files."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from daemon import free_port, refused, serving
from tiny_store import write_model

from flashclient.daemon import private, weightd_command
from flashclient.daemon.address import default_address
from flashclient.daemon.channel import Connection
from flashclient.daemon.private import PrivateDaemon, is_serving
from weightd.cli import main
from weightd.errors import StoreError
from weightd.gateway.addresses import default_listen
from weightd.store.store import Store
from weightd_proto.addresses import SOCKET_FILE, unfit_for_a_socket


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_model(tmp_path / "store")
    return tmp_path / "store"


def test_a_socket_may_have_any_name_but_one_with_a_comma(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a #?%41;&=ü[x]\n"
    folder.mkdir()
    address = f"unix:{folder}/w.sock"
    with serving(store, "--dram", "64MiB", "--listen", address, address=f"unix:{tmp_path}/plain.sock") as daemon:
        connection = Connection(address, 20.0)
        model = connection.describe("tiny")
        data_socket = Path(connection.open_session(model, 2).data_socket)
        connection.close()
        assert data_socket == tmp_path / "plain.sock.data"
        assert is_serving(address)
        assert (folder / "w.sock.peer").exists()
        assert daemon.stop()[0] == 0
    assert list(folder.iterdir()) == []


def test_a_long_folder_for_temporary_files_is_passed_over(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path = tmp_path_factory.mktemp("t")  # tmp_path has the test's name, which is too long
    long = tmp_path / ("t" * (100 - len(str(tmp_path))))
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    folder = private._socket_folder()
    assert unfit_for_a_socket(folder / SOCKET_FILE) is None
    folder.rmdir()
    assert default_listen(77, {}).target == "unix:/tmp/weightd-77/weightd.sock"
    assert default_address(77, {}).startswith("unix:/")
    for unfit in ("a,b", "ok"):
        (tmp_path / unfit).mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / unfit))
        folder = private._socket_folder()
        assert (folder.parent == tmp_path / unfit) == (unfit == "ok")
        folder.rmdir()


def test_proxies_are_for_other_machines(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    port = free_port()
    with serving(store, "--dram", "64MiB", "--listen", f"127.0.0.1:{port}") as daemon:
        for address in (daemon.address, f"127.0.0.1:{port}", f"localhost:{port}", f"dns:///localhost:{port}"):
            Connection(address, 20.0).close()


LOCKS = ["junk", "", "[1]", "{}", '{"pid": 1', '{"pid": "x", "address": 7}', "[" * 4000, '{"pid": 1e999}', "\xff\0"]


def test_a_damaged_lock_is_one_line_of_whoever_looks(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = store / "weightd.lock"
    lock.touch()
    with lock.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for junk in LOCKS:
            lock.write_text(junk, "latin-1")
            assert private._attach(store) is None
            assert main(["rm", "tiny", "--store", str(store)]) == 1
            message = capsys.readouterr().err
            assert message.startswith("weightd: cannot remove 'tiny': a weightd at ")
            assert message.count("\n") == 1
            with pytest.raises(StoreError, match="is served by another weightd, pid "):
                Store.open(store, readonly=True).claim("unix:/x")


def test_a_locked_store_with_a_damaged_lock_refuses_a_daemon(store: Path) -> None:
    with (store / "weightd.lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, message = refused(store, "--dram", "64MiB", "--listen", f"unix:{store}.sock")
    assert (status, message.count("\n")) == (1, 1), message
    assert "pid unknown (weightd.lock is damaged)" in message


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Modules in the current folder, which is also in PYTHONPATH. They write a file when they are imported."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for module in ("lmdb", "grpc", "numpy", "uvloop", "weightd", "gguf", "transformers"):
        (folder / f"{module}.py").write_text(f"open('RAN', 'w').write({module!r})\nraise SystemExit('mine')")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}.{os.pathsep}./{os.pathsep}")
    return folder


def test_children_import_nothing_from_the_current_folder(store: Path, trap: Path) -> None:
    assert weightd_command.output_of([*weightd_command.WEIGHTD, "ls", "--store", str(store)], "no").startswith("tiny: ")
    daemon = PrivateDaemon.start(store, "64MiB")
    try:
        while not is_serving(daemon.address):
            assert not daemon.has_ended(), daemon.last_words()
    finally:
        daemon.stop()
    assert not (trap / "RAN").exists()


@pytest.mark.parametrize("command", ["weightd", "flashclient"])
def test_commands_import_nothing_from_the_current_folder(
    trap: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH")
    (trap / "weightd.py").unlink()  # Python would run it for -m weightd
    done = subprocess.run([sys.executable, "-m", command, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (trap / "RAN").exists()


def test_relative_folders_of_modules_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "src", ".", "/opt/lib", "..", "./", "./lib"]))
    assert weightd_command.environment()["PYTHONPATH"].split(os.pathsep) == ["src", "/opt/lib", "..", "./lib"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep)
    assert "PYTHONPATH" not in weightd_command.environment()
