"""FlashClient(store=...): a private weightd, one that serves already, the race of two starts, and failures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from checkpoints import make_checkpoint
from daemon import serving
from tiny_store import write_model

from flashclient import FlashClient
from flashclient.daemon import private
from flashclient.daemon.private import PrivateDaemon, attach_or_start, is_serving, started_ahead
from flashclient.errors import ModelNotFoundError, ShareError, StartError
from flashclient.generation.rehearsal import rehearse
from weightd import cli
from weightd.machine.budget import minimum_beside
from weightd.serving.served_models import demand_of
from weightd.store.store import Store
from weightd_proto import weightd_pb2
from weightd_proto.files import DAEMON_LOCK_FILE

IDS = [5, 6, 7]
OWNER = """
import os, sys
from flashclient import FlashClient
client = FlashClient("tiny", store=sys.argv[1])
print(client.generate([5, 6, 7], max_new_tokens=4, do_sample=False), flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def imported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the imported checkpoint, which no daemon serves."""
    store = tmp_path_factory.mktemp("imported") / "store"
    assert cli.main(["import", str(checkpoint), "--store", str(store)]) == 0
    return store


@pytest.fixture
def store(imported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(imported, tmp_path / "store"))


def daemons_of(store: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "weightd" in command and str(store) in command:
            found.append(process)
    return found


@pytest.fixture
def owner(store: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has a private weightd and has generated its first tokens."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # the process ends without removing its folder
    command = [sys.executable, "-W", "ignore", "-c", OWNER, str(store)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert len(json.loads(process.stdout.readline())) == 7
        yield process
        process.kill()


def test_a_checkpoint_is_imported_once(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with FlashClient(checkpoint, store=folder, dram="32MiB") as client:
        first = client.generate(IDS, max_new_tokens=8, do_sample=False)
        imported = client.record.import_id
    with FlashClient(str(checkpoint), store=folder) as client:
        assert client.record.import_id == imported
        assert client.record.name == "tiny"
        assert client.generate(IDS, max_new_tokens=8, do_sample=False) == first
    assert daemons_of(folder) == []


def test_a_second_checkpoint_fits_beside_the_first(checkpoint: Path, tmp_path: Path) -> None:
    """A daemon that chose its --dram itself raises it with the models that are imported."""
    larger = make_checkpoint("opt", tmp_path / "larger", layers=4, neurons=4096)
    folder = tmp_path / "store"
    with FlashClient(checkpoint, store=folder) as first:
        expected = first.generate(IDS, max_new_tokens=8, do_sample=False)
        with FlashClient(larger, store=folder) as second:
            assert len(second.generate(IDS, max_new_tokens=8, do_sample=False)) > 8
            assert first.generate(IDS, max_new_tokens=8, do_sample=False) == expected
        assert len(daemons_of(folder)) == 1


@pytest.mark.parametrize("model", ["./nothere", "a/b/c", "/no/where"])
def test_a_path_that_is_not_there_is_called_so(store: Path, model: str) -> None:
    with pytest.raises(
        ModelNotFoundError, match=f"no file or folder '{model}', .* or ORGANISATION/NAME of a model on the"
    ):
        FlashClient(model, store=store)


def test_both_transports_say_the_same(store: Path) -> None:
    with FlashClient("tiny", store=store) as client:
        expected = client.generate(IDS, max_new_tokens=16, do_sample=False)
        with FlashClient("tiny", store=store, transport="grpc") as other:
            assert other.generate(IDS, max_new_tokens=16, do_sample=False) == expected
        assert len(daemons_of(store)) == 1


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_a_private_daemon_that_is_killed_is_started_again(store: Path, transport: str) -> None:
    with (
        FlashClient("tiny", store=store, transport=transport) as client,
        FlashClient("tiny", store=store, transport=transport) as other,
    ):
        expected = client.generate(IDS, max_new_tokens=16, do_sample=False)
        steps = 0

        def kill(*_: object) -> None:
            nonlocal steps
            steps += 1
            if steps == 6:
                daemons_of(store)[0].kill()

        client.model.register_forward_hook(kill)
        for _ in range(2):  # a local pool that holds everything needs no daemon
            assert client.generate(IDS, max_new_tokens=16, do_sample=False) == expected
        if transport == "shm":
            assert len(daemons_of(store)) == 1
            assert other.generate(IDS, max_new_tokens=16, do_sample=False) == expected, "it waits for the same one"
    assert daemons_of(store) == []


def test_a_private_daemon_that_fails_again_is_one_error(store: Path) -> None:
    with FlashClient("tiny", store=store, timeout_s=60.0) as client:
        client.generate(IDS, max_new_tokens=2)
        (daemon,) = daemons_of(store)
        (store / "catalog.mdb").rename(store / "away.mdb")
        daemon.kill()
        daemon.wait(10)
        with pytest.raises(StartError, match="the private weightd ended: "):
            client.generate(IDS, max_new_tokens=2)


def test_attaches_to_the_daemon_that_is_there(store: Path) -> None:
    with serving(store) as daemon:
        assert private._attach(store) == (daemon.address, None)
        with FlashClient("tiny", store=store) as client:
            assert client.generate(IDS, max_new_tokens=2)
            assert [process.pid for process in daemons_of(store)] == [daemon.process.pid]
        assert daemon.process.poll() is None, "a client stopped a daemon that was not its own"


def test_of_two_that_start_one_attaches_to_the_other(store: Path) -> None:
    early = PrivateDaemon.start(store, None)  # started, but perhaps not yet serving
    address, daemon = attach_or_start(store, None, 30.0)
    early.stop()
    assert daemon is not None
    assert is_serving(address), "it goes on for the other one"
    daemon.stop()
    assert daemons_of(store) == []


def test_a_daemon_that_is_started_ahead_is_taken_or_stopped(store: Path) -> None:
    with started_ahead(store, None):
        (early,) = private._ahead.values()
        with FlashClient("tiny", store=store) as client:
            assert [process.pid for process in daemons_of(store)] == [early.pid]
            os.kill(early.pid, signal.SIGKILL)
            assert client.generate(IDS, max_new_tokens=2), "it is started again, because this client owns it"
    with started_ahead(store, "1GiB"):
        pass
    assert daemons_of(store) == []
    with serving(store), started_ahead(store, None):
        assert not private._ahead


def test_nothing_is_started_ahead_for_a_store_without_models(tmp_path: Path) -> None:
    with started_ahead(tmp_path, None):
        assert not private._ahead


@pytest.mark.parametrize("kill", [True, False])
def test_a_private_daemon_ends_with_its_owner(store: Path, owner: subprocess.Popen[str], kill: bool) -> None:
    (daemon,) = daemons_of(store)
    if kill:
        owner.kill()
    else:
        assert owner.stdin is not None
        owner.stdin.close()  # it ends without close()
    daemon.wait(10)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_does_not_keep_the_daemon_alive(store: Path) -> None:
    reading_end, writing_end = os.pipe()
    client = FlashClient("tiny", store=store)
    pid = os.fork()
    if pid == 0:
        os.close(writing_end)
        os.read(reading_end, 1)  # until the parent closes it
        os._exit(0)
    client.close()
    assert daemons_of(store) == []
    os.close(writing_end)
    os.waitpid(pid, 0)
    os.close(reading_end)


def test_a_lock_file_that_outlived_its_daemon_counts_for_nothing(store: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    for content in ("", "{", "[]", json.dumps({"pid": ended.pid, "address": "unix:/nowhere"})):
        (store / DAEMON_LOCK_FILE).write_text(content)
        assert private._attach(store) is None
        FlashClient("tiny", store=store).close()


def test_what_the_daemon_says_is_the_error(store: Path) -> None:
    with pytest.raises(StartError, match=rf"cannot start weightd for {store}: dram=1KiB is too small"):
        FlashClient("tiny", store=store, dram="1KiB")
    with pytest.raises(ModelNotFoundError, match=r"no file or folder 'tiny', and there is no store at .*/missing yet"):
        FlashClient("tiny", store=store / "missing")


def test_a_refused_session_names_what_its_caller_can_raise(store: Path) -> None:
    """The argument of a private weightd, and the flag of one that somebody else has started."""
    write_model(store, "large")
    with Store.open(store, readonly=True) as opened:
        tiny, large = demand_of(opened.model("tiny")), demand_of(opened.model("large"))
    dram_bytes = minimum_beside(tiny, [tiny, large])
    assert dram_bytes < large.minimum_bytes
    with pytest.raises(ShareError, match=r"^large: needs .* of dram=\d.*: raise dram= to \d"):
        FlashClient("large", store=store, dram=dram_bytes)
    with (
        serving(store, "--dram", str(dram_bytes)) as daemon,
        pytest.raises(ShareError, match=r"^large: needs .* of --dram \d.*: raise --dram to \d"),
    ):
        FlashClient("large", address=daemon.address)


def test_what_the_import_says_is_the_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StartError, match=r"cannot import .*/empty: "):
        FlashClient(tmp_path / "empty", store=tmp_path / "store")


def test_this_process_rehearses_what_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has loaded torch already. A child process of the import would take seconds for that."""
    checkpoint = make_checkpoint("llama", tmp_path / "odd")
    (checkpoint / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.0}')
    rehearsed = []

    def recorded(record: weightd_pb2.Model, folder: Path) -> None:
        rehearsed.append(record.name)
        rehearse(record, folder)

    monkeypatch.setattr("flashclient.generation.import_requests.rehearse", recorded)
    for _ in range(2):
        with pytest.raises(StartError, match=r"no client could run .*odd: generation_config.json: "):
            FlashClient(checkpoint, store=tmp_path / "store")
    assert rehearsed == ["odd", "odd"]
    assert "flashclient-import" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("descriptor", ["99999", "-1", "x", str(2**70)])
def test_a_descriptor_that_is_not_open_is_a_usage_error(
    descriptor: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import", str(checkpoint), "--store", str(tmp_path / "store"), f"--client-fd={descriptor}"]
    assert cli.main(command) == 2
    assert f"'{descriptor}' is not an open descriptor" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_another_checkpoint_of_the_same_name_is_refused(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    other = make_checkpoint("llama", tmp_path / "elsewhere" / "tiny")
    with pytest.raises(StartError, match="imported from") as caught:
        FlashClient(other, store=store)
    assert str(checkpoint) in str(caught.value)
    assert str(other) in str(caught.value)
    FlashClient(checkpoint, store=store).close()
    FlashClient("tiny", store=store).close()


def test_dram_for_a_daemon_that_runs_already_is_not_dropped_in_silence(store: Path) -> None:
    with serving(store, "--dram", "64MiB"), pytest.warns(UserWarning, match="no effect.*--dram 64.0MiB"):
        FlashClient("tiny", store=store, dram="32MiB").close()
