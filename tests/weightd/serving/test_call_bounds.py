"""Many clients, or a hostile one: memory stays bounded, and control calls are still answered."""

from __future__ import annotations

import asyncio
import os
import resource
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from daemon import Daemon, free_port, serving
from grpc_health.v1 import health_pb2, health_pb2_grpc
from raw_http2 import RawClient, call
from soaking.hostile_frames import SETTINGS
from tiny_store import write_model

from flashclient.daemon.address import parse_address
from flashclient.daemon.channel import Connection, stub_of
from flashclient.errors import BusyError
from weightd.gateway.users import CONNECTIONS_OF_USER
from weightd.serving.call_bounds import FETCHES_MAX, SERVICE_NAME, CallBounds
from weightd_proto import weightd_pb2 as pb
from weightd_proto import weightd_pb2_grpc

STREAMS = 64
BIG_FILE_BYTES = 33 << 20
OF_PEER = FETCHES_MAX // 2


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    store = tmp_path_factory.mktemp("bounds") / "store"
    write_model(store, config_bytes=BIG_FILE_BYTES)
    with serving(store, "--dram", "64MiB", "--listen", f"127.0.0.1:{free_port()}") as started:
        yield started


def port_of(daemon: Daemon) -> str:
    """The daemon's TCP address. Over TCP each host is a peer of its own."""
    (flag,) = [i for i, word in enumerate(daemon.process.args) if word.startswith("127.0.0.1:")]  # type: ignore
    return str(daemon.process.args[flag])  # type: ignore[index]


def memory_bytes(daemon: Daemon) -> int:
    """The daemon's own memory, without the pool."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(("RssAnon", "RssFile")))


def open_unread(daemon: Daemon, count: int, stub: Any = None) -> list[Any]:
    """Makes fetches whose answers nobody reads. Returns when all that exceed the bound have been refused."""
    streams = [(stub or daemon.stub).Fetch(pb.FetchRequest(model="tiny", file="config.json")) for _ in range(count)]
    while sum(stream.done() for stream in streams) < count - OF_PEER:
        daemon.stub.Stats(pb.StatsRequest(), timeout=20)
    return streams


def end(streams: list[Any]) -> None:
    for stream in streams:
        stream.cancel()


def test_unread_streams_hold_little_memory_and_control_calls_get_through(daemon: Daemon) -> None:
    before = memory_bytes(daemon)
    streams = open_unread(daemon, STREAMS)
    try:
        for _ in range(100):  # takes long enough for the running streams to make their first answer
            daemon.stub.Stats(pb.StatsRequest(), timeout=20)
        assert memory_bytes(daemon) - before < OF_PEER * (8 << 20)
        assert memory_bytes(daemon) < 150 << 20
        refused = {stream.code() for stream in streams if stream.done()}
        assert refused == {grpc.StatusCode.ABORTED}
    finally:
        end(streams)


def test_a_client_is_told_that_the_daemon_is_busy_and_waits(daemon: Daemon) -> None:
    connection = Connection(daemon.address, timeout_s=20)
    request = pb.FetchRequest(model="tiny", placement_of=0)
    with grpc.insecure_channel(daemon.address) as channel:  # its streams are cancelled without being read
        streams = open_unread(daemon, 2 * OF_PEER, stub_of(channel, parse_address(daemon.address)))
        try:
            busy = f"busy: 6 of {FETCHES_MAX} calls of Fetch run, 6 of {OF_PEER} of user {os.geteuid()}"
            with pytest.raises(BusyError, match=busy):
                list(connection.fetch(request, timeout_s=0.2))
        finally:
            end(streams)
    assert len(b"".join(connection.fetch(request))) == 4 * 101
    connection.close()


def test_health_watches_leave_room(daemon: Daemon) -> None:
    stub = health_pb2_grpc.HealthStub(daemon.channel)
    watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(STREAMS)]
    while sum(watch.done() for watch in watches) < STREAMS - 16:
        daemon.stub.Stats(pb.StatsRequest(), timeout=20)
    end(watches)


def test_a_request_that_names_too_much_is_refused(daemon: Daemon) -> None:
    for wanted in (
        pb.NeuronSet(layer=0, neurons=[1] * ((1 << 17) + 1)),
        pb.NeuronSet(layer=0, positions=[pb.Range()] * ((1 << 14) + 1)),
        pb.NeuronSet(layer=0, positions=[pb.Range()] * 500_000),
        pb.NeuronSet(layer=0, positions=[pb.Range(end=101)] * 11_000),
    ):
        with pytest.raises(grpc.RpcError, match="ask in several calls") as caught:
            list(daemon.stub.Fetch(pb.FetchRequest(model="tiny", bundles=wanted)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


HALF_SENT_CONNECTIONS = 5


@pytest.mark.parametrize("method", ["DescribeModel", "Stats", "PublishCalibration", "Fetch"])
def test_half_sent_calls_leave_places_to_others(daemon: Daemon, method: str) -> None:
    """There are as many half-sent calls as places."""
    connection = Connection(daemon.address, timeout_s=20)
    with ExitStack() as stack:
        for _ in range(HALF_SENT_CONNECTIONS):
            strange = stack.enter_context(RawClient(port_of(daemon)))
            strange.send(b"".join(call(method, stream, b"\n" * 100, size=1_000_000) for stream in range(1, 129, 2)))
        assert connection.describe("tiny").name == "tiny"
        assert len(b"".join(connection.fetch(pb.FetchRequest(model="tiny", placement_of=0)))) == 4 * 101
    connection.close()


TOO_MUCH = {
    "DescribeModel": pb.DescribeModelRequest(name="x" * 1_000_000),
    "OpenSession": pb.OpenSessionRequest(model="tiny", import_id=b"x" * 1_000_000),
    "Stats": pb.DescribeModelRequest(name="x" * 5000),
    "Fetch": pb.FetchRequest(file="x" * 1_200_000),
    "PublishCalibration": pb.PublishCalibrationRequest(
        header=pb.PublishCalibrationHeader(model="tiny", calibration=pb.Calibration(files=[pb.File()] * 400_000))
    ),
}


@pytest.mark.parametrize("method", TOO_MUCH)
def test_too_much_is_refused_before_it_is_parsed(daemon: Daemon, method: str) -> None:
    raw: Any = daemon.channel  # Any, because its type stubs do not allow messages of bytes
    with pytest.raises(grpc.RpcError) as caught:
        list(raw.unary_stream(f"/{SERVICE_NAME}/{method}")(TOO_MUCH[method].SerializeToString(), timeout=20))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_unread_streams_of_a_stranger_leave_a_user_his_part(daemon: Daemon) -> None:
    connection = Connection(daemon.address, timeout_s=20)
    with grpc.insecure_channel(port_of(daemon)) as channel:
        streams = open_unread(daemon, STREAMS, weightd_pb2_grpc.WeightdStub(channel))  # type: ignore[no-untyped-call]
        fetched = list(connection.fetch(pb.FetchRequest(model="tiny", placement_of=0)))
        assert len(b"".join(fetched)) == 4 * 101
        end(streams)
    connection.close()


def test_a_users_idle_connections_make_room_for_new_ones(daemon: Daemon) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(daemon.address)) for _ in range(CONNECTIONS_OF_USER + 50)]
        for client in clients[:50]:
            client.await_end()
        assert next(clients[-1].frames())[0] == SETTINGS
        assert memory_bytes(daemon) < 150 << 20
        with grpc.insecure_channel(daemon.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = weightd_pb2_grpc.WeightdStub(channel)  # type: ignore[no-untyped-call]
            assert stub.ListModels(pb.ListModelsRequest(), wait_for_ready=True, timeout=60).names == ["tiny"]


class Streamer:
    """A service with an upload and a stream. The upload returns the number of its messages. The stream is endless and
    sets `ended` when the server ends it."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.began = 0

    async def fetch(self, request: pb.FetchRequest, _: Any) -> AsyncIterator[pb.FetchResponse]:
        self.began += 1
        try:
            while request.model != "empty":
                yield pb.FetchResponse(data=bytes(1 << 20))
        finally:
            self.ended.set()

    async def publish(self, requests: AsyncIterator[pb.PublishCalibrationRequest], _: Any) -> pb.Calibration:
        return pb.Calibration(version=len([request async for request in requests]))

    def handlers(self) -> grpc.GenericRpcHandler:
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "PublishCalibration": grpc.stream_unary_rpc_method_handler(
                self.publish, pb.PublishCalibrationRequest.FromString, pb.Calibration.SerializeToString
            ),
            "Fetch": grpc.unary_stream_rpc_method_handler(
                self.fetch, pb.FetchRequest.FromString, pb.FetchResponse.SerializeToString
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)


AGED = [("grpc.max_connection_age_ms", 1000), ("grpc.max_connection_age_grace_ms", 1000)]


@dataclass
class Impatient:
    """A server with the bounds of weightd that waits only a moment for its callers."""

    streamer: Streamer
    stub: weightd_pb2_grpc.WeightdStub


@contextmanager
def impatient(folder: Path, options: list[tuple[str, int]], patience_s: float = 0.5) -> Iterator[Impatient]:
    listening, ending, streamer = threading.Event(), threading.Event(), Streamer()

    async def serve() -> None:
        server = grpc.aio.server(
            interceptors=[CallBounds(lambda _: "all", lambda _: None, patience_s)], options=options
        )
        server.add_generic_rpc_handlers((streamer.handlers(),))
        server.add_insecure_port(f"unix:{folder}/s")
        await server.start()
        listening.set()
        await asyncio.to_thread(ending.wait)
        await server.stop(None)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert listening.wait(60)
    try:
        with grpc.insecure_channel(f"unix:{folder}/s") as channel:
            yield Impatient(streamer, weightd_pb2_grpc.WeightdStub(channel))  # type: ignore[no-untyped-call]
    finally:
        ending.set()
        thread.join()


def test_an_upload_that_stops_is_given_up(tmp_path: Path) -> None:
    silent = threading.Event()

    def requests() -> Iterator[pb.PublishCalibrationRequest]:
        yield pb.PublishCalibrationRequest()
        silent.wait(60)

    with impatient(tmp_path, [], patience_s=5) as server:  # long enough for the second upload on a busy machine
        with pytest.raises(grpc.RpcError) as caught:
            server.stub.PublishCalibration(requests(), timeout=60)
        silent.set()
        assert "too little was sent" in (caught.value.details() or "")
        whole = [pb.PublishCalibrationRequest()] * 3
        assert server.stub.PublishCalibration(iter(whole), timeout=60).version == 3


def test_an_upload_that_trickles_is_given_up(tmp_path: Path) -> None:
    """Each of its messages comes in time, but all of them together would hold a place for ever."""
    refused = threading.Event()

    def requests() -> Iterator[pb.PublishCalibrationRequest]:
        while not refused.wait(0.1):
            yield pb.PublishCalibrationRequest(data=b"x")

    with impatient(tmp_path, []) as server:
        with pytest.raises(grpc.RpcError) as caught:
            server.stub.PublishCalibration(requests(), timeout=60)
        refused.set()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_stream_that_nobody_reads_is_given_up_and_whoever_reads_on_is_told(tmp_path: Path) -> None:
    with impatient(tmp_path, []) as server:
        stream = server.stub.Fetch(pb.FetchRequest())
        assert server.streamer.ended.wait(60)  # its place is free although nobody has read anything
        with pytest.raises(grpc.RpcError) as caught:
            for _ in stream:
                pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "no answer was taken for 0.5 s" in (caught.value.details() or "")


def answer_in_time(stub: weightd_pb2_grpc.WeightdStub, request: pb.FetchRequest) -> list[pb.FetchResponse]:
    """The answer. Asks again until the server has noticed that the other calls have ended, and if a connection became
    too old as the call began."""
    while True:
        try:
            return list(stub.Fetch(request, timeout=60))
        except grpc.RpcError as error:
            too_old = error.code() is grpc.StatusCode.UNAVAILABLE and error.details() == "max connection age"
            if error.code() is not grpc.StatusCode.ABORTED and not too_old:
                raise


def test_streams_that_nobody_ever_reads_end_with_their_connection(tmp_path: Path) -> None:
    with impatient(tmp_path, AGED) as server:
        streams = [server.stub.Fetch(pb.FetchRequest()) for _ in range(OF_PEER)]
        while server.streamer.began < OF_PEER:
            assert server.streamer.ended.wait(60)
        assert answer_in_time(server.stub, pb.FetchRequest(model="empty")) == []  # over a new connection
        end(streams)
