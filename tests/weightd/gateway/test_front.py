"""The front ends or slows down clients that misbehave, and others go on. Over real sockets, with and without TLS."""

from __future__ import annotations

import resource
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest
from certificates import Authority
from daemon import Daemon, free_port, serving
from raw_http2 import RawClient, call
from soaking.hostile_frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    call_headers,
    frame,
    literal,
)
from tiny_store import write_model

from flashclient.daemon.channel import Connection
from weightd_proto import weightd_pb2 as pb

MIB = 1 << 20


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def tls_address() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, authority: Authority, tls_address: str) -> Iterator[Daemon]:
    store, server = tmp_path_factory.mktemp("front") / "store", authority.sign("server")
    write_model(store)
    more = ["--listen", tls_address, "--tls-cert", str(server.cert), "--tls-key", str(server.key)]
    with serving(store, "--dram", "64MiB", *more) as started:
        yield started


@pytest.fixture
def strange(tls_address: str) -> Iterator[RawClient]:
    """A client without a certificate, over TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with RawClient(tls_address, b"") as client:
        client.socket = context.wrap_socket(client.socket)
        client.send(PREFACE + frame(SETTINGS, 0, 0))
        yield client


def memory_bytes(daemon: Daemon) -> int:
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))


def block(flags: int) -> bytes:
    return frame(HEADERS, flags, 1, call_headers("Stats"))


ENDED_AT_ONCE: dict[str, Callable[[], bytes]] = {
    "a header block without an end": lambda: block(0) + frame(CONTINUATION, 0, 1, bytes(1000)) * 20,
    "continuations of nothing": lambda: block(0) + frame(CONTINUATION, 0, 1) * 20,
    "a header block of many bytes": lambda: frame(HEADERS, 0, 1, literal(b"a", b"b" * 100) * 160) * 2,
    "a frame within a header block": lambda: block(0) + frame(PING, 0, 0, bytes(8)),
    "a header block without a beginning": lambda: frame(CONTINUATION, END_HEADERS, 1, b""),
    "padded data": lambda: block(END_HEADERS) + frame(DATA, 8, 1, b"\x05" + bytes(10)),
    "long settings": lambda: frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 1) * 1000),
    "a long frame of no known type": lambda: frame(77, 0, 0, bytes(16384)),
    "a promise": lambda: frame(5, 4, 1, bytes(8)),
    "too many calls": lambda: b"".join(call("Fetch", stream, size=100) for stream in range(1, 4001, 2)),
}


@pytest.mark.parametrize("attack", ENDED_AT_ONCE)
@pytest.mark.parametrize("transport", ["unix", "tls"])
def test_what_no_client_sends_ends_its_connection_alone(
    daemon: Daemon, strange: RawClient, attack: str, transport: str
) -> None:
    with RawClient(daemon.address) as local:
        client = strange if transport == "tls" else local
        with suppress(OSError):  # weightd has closed the connection already
            client.send(ENDED_AT_ONCE[attack]())
        client.await_end()
    assert daemon.stub.ListModels(pb.ListModelsRequest(), timeout=20).names == ["tiny"]


@pytest.mark.parametrize("begins", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", PREFACE[:10] + b"x"])
def test_what_is_not_http2_is_hung_up_on(daemon: Daemon, begins: bytes) -> None:
    with RawClient(daemon.address, begins) as client:
        client.await_end()


def test_who_begins_and_says_no_more_is_hung_up_on(daemon: Daemon, tls_address: str) -> None:
    with ExitStack() as stack:
        starts = [
            b"",
            PREFACE[:5],
            PREFACE + b"\0\0",
            PREFACE + block(0),
            PREFACE + frame(SETTINGS, 0, 0, b"123456")[:-1],
        ]
        silent = [stack.enter_context(RawClient(daemon.address, begins)) for begins in starts]
        silent.append(stack.enter_context(RawClient(tls_address, b"\x16\x03\x01")))
        for client in silent:
            client.await_end()


FLOODS = {
    "pings": frame(PING, 0, 0, bytes(8)),
    "settings": frame(SETTINGS, 0, 0),
    "priorities": frame(PRIORITY, 0, 1, bytes(5)),
    "frames of no known type": frame(99, 0, 0),
    "data of nobody": frame(DATA, 0, 1),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_is_read_slowly_and_others_go_on(daemon: Daemon, strange: RawClient, flood: str) -> None:
    before = memory_bytes(daemon)
    strange.socket.setblocking(False)
    data, sent = FLOODS[flood] * 10_000, 0
    for _ in range(50):
        try:
            sent += strange.socket.send(data[sent % len(FLOODS[flood]) :])
        except (BlockingIOError, ssl.SSLWantWriteError):
            pass
        except OSError:
            break  # gRPC has closed the connection
        daemon.stub.Stats(pb.StatsRequest(), timeout=20)
    assert memory_bytes(daemon) - before < 20 * MIB


def test_calls_that_are_reset_at_once_are_no_burden(daemon: Daemon, strange: RawClient) -> None:
    before = memory_bytes(daemon)
    try:
        for first in range(1, 20_001, 200):
            streams = range(first, first + 200, 2)
            strange.send(b"".join(call("Stats", each) + frame(RST_STREAM, 0, each, bytes(4)) for each in streams))
    except OSError:
        pass  # gRPC has closed the connection
    daemon.stub.Stats(pb.StatsRequest(), timeout=20)
    assert memory_bytes(daemon) - before < 20 * MIB


@pytest.mark.parametrize("transport", ["unix", "tls"])
def test_messages_that_are_half_there_are_bounded_before_they_come(
    daemon: Daemon, strange: RawClient, transport: str
) -> None:
    """Each announces a mebibyte. When they exceed the bound of a user, gRPC refuses them with RESOURCE_EXHAUSTED."""
    before = memory_bytes(daemon)
    with RawClient(daemon.address) as local:
        client = strange if transport == "tls" else local
        for stream in range(1, 129, 2):
            client.send(call("Stats", stream, b"\n" * 8000, size=MIB))
        statuses = b""
        for kind, _, _, payload in client.frames():
            statuses += payload if kind == HEADERS else b""
            if b"grpc-status\x018" in statuses:  # RESOURCE_EXHAUSTED
                break
        assert memory_bytes(daemon) - before < 40 * MIB
    assert daemon.stub.ListModels(pb.ListModelsRequest(), timeout=20).names == ["tiny"]


def test_answers_that_are_not_read_do_not_pile_up(daemon: Daemon, strange: RawClient) -> None:
    """The client's flow-control window is closed, so the daemon keeps each answer. A user's open calls are bounded."""
    before = memory_bytes(daemon)
    try:
        strange.send(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)))
        strange.send(b"".join(call("DescribeModel", each, b"\n\x04tiny") for each in range(1, 2001, 2)))
    except OSError:
        pass
    assert daemon.stub.ListModels(pb.ListModelsRequest(), timeout=20).names == ["tiny"]
    assert memory_bytes(daemon) - before < 20 * MIB


def test_the_inner_socket_has_no_name(daemon: Daemon) -> None:
    sockets = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
    inner = [path for path in sockets if path.endswith("/inner")]
    assert inner
    assert not any(Path(path).exists() for path in inner)


def test_a_message_whose_length_comes_byte_by_byte_is_read(daemon: Daemon) -> None:
    whole = call("DescribeModel", 1, b"\n\x04tiny")
    with RawClient(daemon.address) as client:
        for place in range(len(whole)):
            client.send(whole[place : place + 1])
        assert any(kind == DATA and b"tiny" in payload for kind, _, _, payload in _until_end_of_call(client))


def _until_end_of_call(client: RawClient) -> Iterator[tuple[int, int, int, bytes]]:
    for kind, flags, stream, payload in client.frames():
        yield kind, flags, stream, payload
        if stream and flags & 1:
            return


def test_a_running_stream_goes_on_beside_an_attack(daemon: Daemon, strange: RawClient) -> None:
    connection = Connection(daemon.address, timeout_s=20)
    try:
        strange.send(b"".join(call("PublishCalibration", stream, b"x", size=MIB) for stream in range(1, 129, 2)))
        for _ in range(20):
            assert len(b"".join(connection.fetch(pb.FetchRequest(model="tiny", placement_of=0)))) == 4 * 101
            assert connection.describe("tiny").name == "tiny"
    finally:
        connection.close()


def test_too_much_for_a_call_is_refused(daemon: Daemon) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        daemon.stub.DescribeModel(pb.DescribeModelRequest(name="x" * 2 * MIB))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_without_descriptors_it_waits_for_some(tmp_path: Path) -> None:
    """The daemon neither spins nor stops listening."""
    write_model(tmp_path / "store")
    with serving(tmp_path / "store", "--dram", "64MiB") as daemon:
        limits = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        with RawClient(daemon.address):
            assert daemon.process.stderr is not None
            for line in daemon.process.stderr:
                if "no connection can be accepted" in line:
                    break
            resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, limits)
            connection = Connection(daemon.address, 10)
            assert connection.stats().sessions == 0
            connection.close()
        _, log = daemon.stop()
    assert log.count("no connection can be accepted") < 10
