"""The control plane of a real daemon process, called over gRPC."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from byte_flips import flip_bit
from daemon import Daemon, serving
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tiny_store import TinyModel, write_model

from weightd.serving.served_models import demand_of
from weightd_proto import weightd_pb2 as pb

RESPONSE_BYTES_MAX = 1 << 20


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "store"


@pytest.fixture(scope="module")
def tiny(store: Path) -> TinyModel:
    """A model with many bundles per cell."""
    return write_model(store)


@pytest.fixture(scope="module")
def wide(store: Path) -> TinyModel:
    """A model whose bundles have many blocks and are larger than a response."""
    return write_model(store, "wide", layers=1, neurons=3, bundle_bytes=3 * 349_696, seed=1)


@pytest.fixture(scope="module")
def daemon(store: Path, tiny: TinyModel, wide: TinyModel) -> Iterator[Daemon]:
    with serving(store, "--dram", "64MiB") as started:
        yield started


def fetch(daemon: Daemon, model: str, **what: Any) -> list[bytes]:
    responses = list(daemon.stub.Fetch(pb.FetchRequest(model=model, **what)))
    assert all(response.ByteSize() <= RESPONSE_BYTES_MAX for response in responses)
    return [response.data for response in responses]


def status_of(daemon: Daemon, model: str, **what: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        fetch(daemon, model, **what)
    return caught.value.code(), caught.value.details() or ""


def test_models_are_listed_and_described(daemon: Daemon, tiny: TinyModel) -> None:
    assert list(daemon.stub.ListModels(pb.ListModelsRequest()).names) == ["tiny", "wide"]
    assert daemon.stub.DescribeModel(pb.DescribeModelRequest(name="tiny")) == tiny.record


def test_an_unknown_model_is_not_found_and_the_known_are_named(daemon: Daemon) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        daemon.stub.DescribeModel(pb.DescribeModelRequest(name="nope"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert all(word in (caught.value.details() or "") for word in ("'nope'", "tiny", "wide"))
    with pytest.raises(grpc.RpcError) as caught:
        daemon.stub.OpenSession(pb.OpenSessionRequest(model="nope"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("name", ["x" * 4000, "\u20ac" * 1300, "a\nb"])
def test_a_refusal_of_something_long_is_short(daemon: Daemon, name: str) -> None:
    """The text is sent in a header, and clients drop calls whose headers are long."""
    with pytest.raises(grpc.RpcError) as caught:
        daemon.stub.DescribeModel(pb.DescribeModelRequest(name=name))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert (caught.value.details() or "").startswith("no model '")


def test_bundles_come_in_the_order_asked(daemon: Daemon, tiny: TinyModel) -> None:
    neurons = [100, 0, 7, 7, 64, 63, 1]
    ranges = [pb.Range(begin=90, end=101), pb.Range(begin=5, end=5), pb.Range(begin=0, end=3)]
    data = fetch(daemon, "tiny", bundles=pb.NeuronSet(layer=1, neurons=neurons, positions=ranges))
    wanted = [*neurons, *range(90, 101), *range(3)]
    assert b"".join(data) == tiny.bundles[1][wanted].tobytes()


def test_a_bundle_is_never_split_across_responses(daemon: Daemon, tiny: TinyModel) -> None:
    wanted = np.random.default_rng(2).integers(0, 101, 30_000)
    data = fetch(daemon, "tiny", bundles=pb.NeuronSet(layer=0, neurons=wanted.tolist()))
    assert len(data) > 1
    assert all(len(part) % tiny.record.bundle.bundle_bytes == 0 for part in data)
    assert b"".join(data) == tiny.bundles[0][wanted].tobytes()


def test_a_bundle_larger_than_a_response_is_cut(daemon: Daemon, wide: TinyModel) -> None:
    data = fetch(daemon, "wide", bundles=pb.NeuronSet(layer=0, neurons=[2, 0]))
    assert b"".join(data) == wide.bundles[0][[2, 0]].tobytes()


def test_nothing_asked_is_nothing_answered(daemon: Daemon) -> None:
    assert fetch(daemon, "tiny", bundles=pb.NeuronSet(layer=0)) == []
    assert fetch(daemon, "tiny", resident=pb.ByteRange(offset=5, size=0)) == []


def test_resident_files_and_placement(daemon: Daemon, tiny: TinyModel) -> None:
    whole = pb.ByteRange(offset=0, size=len(tiny.resident))
    assert b"".join(fetch(daemon, "tiny", resident=whole)) == tiny.resident
    assert b"".join(fetch(daemon, "tiny", resident=pb.ByteRange(offset=9, size=77))) == tiny.resident[9:86]
    assert b"".join(fetch(daemon, "tiny", file="config.json")) == tiny.config
    placement = np.frombuffer(b"".join(fetch(daemon, "tiny", placement_of=1)), "<u4")
    assert placement.tolist() == list(range(101))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"bundles": pb.NeuronSet(layer=2, neurons=[0])}, ["no layer 2", "2 layers"]),
        ({"bundles": pb.NeuronSet(layer=0, neurons=[5, 101])}, ["no neuron 101", "101 bundles"]),
        ({"bundles": pb.NeuronSet(layer=0, positions=[pb.Range(begin=0, end=102)])}, ["102", "101 bundles"]),
        ({"bundles": pb.NeuronSet(layer=0, positions=[pb.Range(begin=7, end=6)])}, ["7 to 6"]),
        ({"resident": pb.ByteRange(offset=1, size=3 << 20)}, ["3145728"]),
        ({"resident": pb.ByteRange(offset=(1 << 64) - 1, size=2)}, ["3145728"]),
        ({"file": "../catalog.mdb"}, ["../catalog.mdb", "config.json"]),
        ({"placement_of": 2}, ["no layer 2"]),
        ({}, ["none of them"]),
    ],
)
def test_what_is_not_there_is_an_invalid_argument(daemon: Daemon, what: dict[str, Any], words: list[str]) -> None:
    status, details = status_of(daemon, "tiny", **what)
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert all(word in details for word in words), details


def test_a_session_gets_a_token_and_the_data_socket(daemon: Daemon) -> None:
    opened = daemon.stub.OpenSession(pb.OpenSessionRequest(model="tiny", slots_wanted=2))
    assert len(opened.token) == 16
    assert opened.share_slots == 2
    assert stat.S_ISSOCK(Path(opened.data_socket).stat().st_mode)


def test_stats_are_a_sum_within_the_cap(daemon: Daemon) -> None:
    before = daemon.stub.Stats(pb.StatsRequest())
    fetch(daemon, "tiny", bundles=pb.NeuronSet(layer=0, positions=[pb.Range(begin=0, end=101)]))
    after = daemon.stub.Stats(pb.StatsRequest())
    assert after.dram_limit_bytes == 64 << 20
    assert after.dram_pool_bytes + after.dram_resident_bytes + after.dram_tables_bytes <= after.dram_limit_bytes
    assert after.io_engine
    asked = [sum(model.hits + model.misses for model in stats.models) for stats in (before, after)]
    assert asked[1] - asked[0] == 4  # cells: 101 bundles, 32 to a cell


def test_reflection_names_the_service(daemon: Daemon) -> None:
    database = ProtoReflectionDescriptorDatabase(daemon.channel)
    assert "weightd.v1.Weightd" in database.get_services()
    service = DescriptorPool(database).FindServiceByName("weightd.v1.Weightd")
    assert "Fetch" in service.methods_by_name


def test_the_socket_is_for_the_users_group(daemon: Daemon) -> None:
    socket = Path(daemon.address.removeprefix("unix:"))
    assert stat.S_IMODE(socket.stat().st_mode) == 0o660


def test_the_interpreter_is_small_and_without_torch(daemon: Daemon) -> None:
    fetch(daemon, "tiny", bundles=pb.NeuronSet(layer=0, neurons=list(range(101)) * 300))
    process = Path(f"/proc/{daemon.process.pid}")
    loaded = (process / "maps").read_text()
    assert "torch" not in loaded
    assert "transformers" not in loaded
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    used_kib = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssFile"))
    assert used_kib < 150 << 10


def test_corruption_names_model_layer_and_neuron(tmp_path: Path) -> None:
    store = tmp_path / "store"
    model = write_model(store)
    flip_bit(store / "tiny" / "bundles.bin", model.record.layers[1].offset_bytes + 128 * 5)
    with serving(store, "--dram", "64MiB") as daemon:
        status, details = status_of(daemon, "tiny", bundles=pb.NeuronSet(layer=1, neurons=[5]))
        assert status is grpc.StatusCode.DATA_LOSS
        assert "model tiny, layer 1, neuron 5:" in details
        good = b"".join(fetch(daemon, "tiny", bundles=pb.NeuronSet(layer=0, neurons=[5])))
        assert good == model.bundles[0][5].tobytes()
        assert sum(each.verify_errors for each in daemon.stub.Stats(pb.StatsRequest()).models) >= 1


def test_corrupt_resident_weights_are_data_loss(tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_model(store)
    flip_bit(store / "tiny" / "resident.safetensors", 4711)
    with serving(store, "--dram", "64MiB") as daemon, pytest.raises(grpc.RpcError) as caught:
        daemon.stub.OpenSession(pb.OpenSessionRequest(model="tiny"))
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    assert "embed" in (caught.value.details() or "")


def test_a_model_imported_meanwhile_is_served(tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_model(store)
    with serving(store, "--dram", "64MiB") as daemon:
        late = write_model(store, "late", seed=3)
        assert list(daemon.stub.ListModels(pb.ListModelsRequest()).names) == ["late", "tiny"]
        data = fetch(daemon, "late", bundles=pb.NeuronSet(layer=0, neurons=[50]))
        assert data == [late.bundles[0][50].tobytes()]


def test_shares_run_out_with_the_numbers(tmp_path: Path) -> None:
    store = tmp_path / "store"
    smallest_bytes = demand_of(write_model(store).record).minimum_bytes
    with serving(store, "--dram", str(smallest_bytes)) as daemon:
        status, details = open_sessions(daemon, "tiny", 100)
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert any(character.isdigit() for character in details)
        daemon.stub.ListModels(pb.ListModelsRequest())


def open_sessions(daemon: Daemon, model: str, count: int) -> tuple[grpc.StatusCode, str]:
    """Opens up to `count` sessions. Returns the error of the first that is refused."""
    for opened in range(count):
        try:
            daemon.stub.OpenSession(pb.OpenSessionRequest(model=model))
        except grpc.RpcError as error:
            assert opened > 0
            return error.code(), error.details() or ""
    raise AssertionError(f"all {count} sessions were opened")
