"""`weightd rm` and `import --update` while a daemon serves the store: whoever uses a model keeps it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from checkpoints import make_checkpoint
from daemon import Daemon, serving
from tiny_store import write_model

from flashclient import FlashClient
from flashclient.daemon.channel import Connection
from flashclient.errors import ModelNotFoundError, RefusedError
from flashclient.source.ring import RingSource
from weightd.cli import main
from weightd.store.store import Store
from weightd_proto import weightd_pb2 as pb


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    write_model(folder)
    write_model(folder, "other", seed=1)
    return folder


@pytest.fixture
def daemon(store: Path) -> Iterator[Daemon]:
    with serving(store, "--dram", "64MiB") as started:
        yield started


def remove(store: Path, name: str) -> int:
    return main(["rm", name, "--store", str(store)])


def files_open(daemon: Daemon, store: Path, name: str) -> list[str]:
    paths = []
    for entry in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since
            paths.append(os.readlink(entry))  # noqa: PTH115
    return [path for path in paths if path.startswith(str(store / name))]


def deleted_files(daemon: Daemon, store: Path) -> list[str]:
    return [path for path in files_open(daemon, store, "") if path.endswith("(deleted)")]


def test_a_model_that_nobody_uses_is_removed(store: Path, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    connection = Connection(daemon.address, 20.0)
    before = connection.stats()
    assert files_open(daemon, store, "tiny")
    assert remove(store, "tiny") == 0
    assert not (store / "tiny").exists()
    assert not files_open(daemon, store, "tiny")
    with pytest.raises(ModelNotFoundError, match="there is other"):
        connection.describe("tiny")
    after = connection.stats()
    assert [model.name for model in after.models] == ["other"]
    assert after.dram_tables_bytes < before.dram_tables_bytes
    assert connection.describe("other").name == "other"
    assert remove(store, "tiny") == 1
    assert "no model 'tiny'" in capsys.readouterr().err
    connection.close()


def test_another_model_of_the_name_is_served_then(store: Path, daemon: Daemon) -> None:
    connection = Connection(daemon.address, 20.0)
    first = b"".join(connection.fetch(pb.FetchRequest(model="tiny", placement_of=0)))
    assert remove(store, "tiny") == 0
    again = write_model(store, neurons=50, seed=9)
    assert len(b"".join(connection.fetch(pb.FetchRequest(model="tiny", placement_of=0)))) < len(first)
    wanted = pb.NeuronSet(layer=0, neurons=[7])
    fetched = b"".join(connection.fetch(pb.FetchRequest(model="tiny", bundles=wanted)))
    assert np.array_equal(np.frombuffer(fetched, np.uint8)[: again.bundles[0].shape[1]], again.bundles[0][7])
    connection.close()


def test_a_model_in_use_stays(store: Path, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    connection = Connection(daemon.address, 20.0)
    source = RingSource(connection, connection.describe("tiny"), False)
    assert remove(store, "tiny") == 1
    said = capsys.readouterr().err
    assert "model 'tiny' is in use: end its clients" in said
    assert said.count("\n") == 1
    assert connection.describe("tiny").name == "tiny"
    source.close()
    for _ in range(200):  # the daemon notices the end of the session by itself
        if remove(store, "tiny") == 0:
            break
    assert not (store / "tiny").exists()
    connection.close()


def test_a_model_in_use_is_replaced_for_those_who_come_later(tmp_path: Path) -> None:
    checkpoint, store = make_checkpoint("llama", tmp_path / "m", layers=1), tmp_path / "store"
    assert main(["import", str(checkpoint), "--store", str(store)]) == 0
    with serving(store, "--dram", "64MiB") as daemon:
        connection = Connection(daemon.address, 20.0)
        with FlashClient("m", address=daemon.address) as early:
            before = early.generate([1, 2, 3], max_new_tokens=8, do_sample=False)
            make_checkpoint("llama", checkpoint, layers=1, seed=5)
            assert main(["import", str(checkpoint), "--store", str(store), "--update"]) == 0
            with FlashClient("m", address=daemon.address) as late:
                after = late.generate([1, 2, 3], max_new_tokens=8, do_sample=False)
            with FlashClient(str(checkpoint), store=store) as same:
                assert same.generate([1, 2, 3], max_new_tokens=8, do_sample=False) == after
            assert after != before
            assert early.generate([1, 2, 3], max_new_tokens=8, do_sample=False) == before
            assert [(model.name, model.sessions) for model in connection.stats().models] == [("m", 1)]
            with pytest.raises(RefusedError, match="'m' is another import than the one asked for: make a new client"):
                b"".join(connection.fetch(pb.FetchRequest(model="m", import_id=b"a" * 16, placement_of=0)))
            (counted,) = connection.stats().models
        while deleted_files(daemon, store):
            connection.stats()  # the daemon notices the end of the session by itself
        (closed,) = connection.stats().models
        assert min(counted.hits + counted.misses, counted.reads) > 0
        for counter in ("hits", "misses", "reads", "read_bytes", "reading_s", "read_latency_sum_s"):
            assert getattr(closed, counter) >= getattr(counted, counter), counter
        assert sum(closed.read_latency_counts) >= sum(counted.read_latency_counts)
        assert remove(store, "m") == 0
        assert not connection.stats().models
        connection.close()


def test_a_replaced_model_is_closed_though_no_other_is_open(tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = write_model(store)
    with serving(store, "--dram", "64MiB", "--cold-start") as daemon:
        connection = Connection(daemon.address, 20.0)
        source = RingSource(connection, connection.describe("tiny"), False)
        write_model(store, seed=1, replaces=first.record.import_id)
        connection.remove("tiny", replaced=True)
        assert remove(store, "tiny") == 0
        assert deleted_files(daemon, store)
        source.close()
        while deleted_files(daemon, store):
            connection.stats()  # nobody opens a model or asks for a closing
        connection.close()


def test_only_root_and_the_daemons_user_may(store: Path, daemon: Daemon) -> None:
    with pytest.raises(grpc.RpcError) as caught:  # without an identity
        daemon.stub.RemoveModel(pb.RemoveModelRequest(name="tiny"))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "may not remove models: only root and weightd's own user" in (caught.value.details() or "")
    connection = Connection(daemon.address, 20.0)
    with pytest.raises(ModelNotFoundError, match="no model 'nothing'"):
        connection.remove("nothing")
    with pytest.raises((ModelNotFoundError, RefusedError)):
        connection.remove("../tiny")
    connection.close()
    with Store.open(store, readonly=True) as opened:
        assert opened.names() == ["other", "tiny"]
