"""TCP with TLS: who may connect, and how each wrong certificate is refused. Over real sockets."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from certificates import Authority, Pair
from daemon import Daemon, free_port, refused, serving
from tiny_store import write_model

from flashclient import FlashClient
from flashclient.daemon.address import TlsOptions
from flashclient.daemon.channel import Connection
from flashclient.errors import NoDaemonError, OptionError
from weightd_proto import weightd_pb2 as pb


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_model(tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def server(authority: Authority) -> Pair:
    return authority.sign("server")


def flags(server: Pair, *more: str) -> list[str]:
    return ["--dram", "64MiB", "--tls-cert", str(server.cert), "--tls-key", str(server.key), *more]


@pytest.fixture
def daemon(store: Path, authority: Authority, server: Pair) -> Iterator[Daemon]:
    """A daemon with TLS. Clients need no certificate."""
    address = f"127.0.0.1:{free_port()}"
    with serving(store, *flags(server), address=address, credentials=authority.credentials()) as started:
        yield started


@pytest.fixture
def mutual(store: Path, authority: Authority, server: Pair) -> Iterator[Daemon]:
    """A daemon with mutual TLS."""
    address, known = f"127.0.0.1:{free_port()}", authority.credentials(authority.sign("prober"))
    with serving(store, *flags(server, "--tls-client-ca", str(authority.ca)), address=address, credentials=known) as it:
        yield it


def names_at(address: str, tls: TlsOptions) -> list[str]:
    connection = Connection(address, 5.0, tls)
    try:
        return list(connection.stub.ListModels(pb.ListModelsRequest(), timeout=5).names)
    finally:
        connection.close()


def test_a_client_that_knows_the_authority_is_served(daemon: Daemon, authority: Authority) -> None:
    assert names_at(daemon.address, TlsOptions(authority.ca)) == ["tiny"]
    port = daemon.address.rpartition(":")[2]
    assert names_at(f"dns:///localhost:{port}", TlsOptions(authority.ca)) == ["tiny"]


def test_a_daemon_of_another_authority_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    with pytest.raises(NoDaemonError, match="certificates was not accepted"):
        names_at(daemon.address, TlsOptions(Authority(tmp_path, "other").ca))


def test_plain_text_against_tls_is_refused(daemon: Daemon) -> None:
    with pytest.raises(NoDaemonError, match="tls_ca="):
        names_at(daemon.address, TlsOptions())


def test_tls_against_plain_text_is_refused(store: Path, authority: Authority) -> None:
    with (
        serving(store, "--dram", "64MiB", address=f"127.0.0.1:{free_port()}") as plain,
        pytest.raises(NoDaemonError, match="certificates was not accepted"),
    ):
        names_at(plain.address, TlsOptions(authority.ca))


def test_mutual_tls_serves_a_signed_client(mutual: Daemon, authority: Authority) -> None:
    client = authority.sign("client")
    assert names_at(mutual.address, TlsOptions(authority.ca, client.cert, client.key)) == ["tiny"]


def test_mutual_tls_refuses_a_client_without_a_certificate(mutual: Daemon, authority: Authority) -> None:
    with pytest.raises(NoDaemonError):
        names_at(mutual.address, TlsOptions(authority.ca))


def test_mutual_tls_refuses_a_client_of_another_authority(mutual: Daemon, authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path, "other").sign("stranger")
    with pytest.raises(NoDaemonError):
        names_at(mutual.address, TlsOptions(authority.ca, other.cert, other.key))


def test_mutual_tls_refuses_an_expired_client(mutual: Daemon, authority: Authority) -> None:
    late = authority.sign("late", days=-1)
    with pytest.raises(NoDaemonError):
        names_at(mutual.address, TlsOptions(authority.ca, late.cert, late.key))


def test_an_expired_certificate_is_warned_of_and_refused_by_clients(
    store: Path, authority: Authority, tmp_path: Path
) -> None:
    late, address = authority.sign("late", days=-1), f"127.0.0.1:{free_port()}"
    with serving(store, *flags(late, "--listen", address)) as daemon:
        with pytest.raises(NoDaemonError):
            names_at(address, TlsOptions(authority.ca))
        _, log = daemon.stop()
    assert "expired on" in log


def test_a_replaced_certificate_is_taken_without_a_restart(
    daemon: Daemon, authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path, "other")
    other.sign("server")  # replaces the files that the daemon has read
    assert names_at(daemon.address, TlsOptions(other.ca)) == ["tiny"]
    with pytest.raises(NoDaemonError):
        names_at(daemon.address, TlsOptions(authority.ca))


def test_a_broken_replacement_is_told_and_not_taken(daemon: Daemon, authority: Authority, server: Pair) -> None:
    server.cert.write_text("nonsense")
    daemon.process.send_signal(signal.SIGHUP)
    assert names_at(daemon.address, TlsOptions(authority.ca)) == ["tiny"]
    _, log = daemon.stop()
    assert log.count("stays in use") == 1, log


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (lambda pair: pair.cert.unlink(), ["--tls-cert", "server.pem", "no such file"]),
        (lambda pair: pair.key.unlink(), ["--tls-key", "server.key", "no such file"]),
        (lambda pair: (pair.key.unlink(), pair.key.mkdir()), ["--tls-key", "is a directory"]),
        (lambda pair: pair.cert.write_text("x"), ["--tls-cert", "no certificate"]),
        (lambda pair: pair.key.write_text("x"), ["--tls-key", "no private key"]),
        (lambda pair: pair.key.with_name("other.key").replace(pair.key), ["--tls-key", "not the key of"]),
    ],
    ids=["no-certificate", "no-key", "unreadable-key", "bad-certificate", "bad-key", "wrong-key"],
)
def test_files_that_cannot_be_used_are_one_line_at_start(
    store: Path, authority: Authority, server: Pair, breaks: object, words: list[str]
) -> None:
    authority.sign("other")
    assert callable(breaks)
    breaks(server)
    status, message = refused(store, *flags(server, "--listen", f"127.0.0.1:{free_port()}"))
    assert (status, message.count("\n")) == (2, 1), message
    assert all(word in message.lower() for word in words), message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--listen", "0.0.0.0:7411"], ["TLS", "--tls-cert"]),
        (["--listen", "localhost:7411", "--tls-cert", "/c"], ["--tls-key", "together"]),
        (["--listen", "localhost:7411", "--tls-client-ca", "/c"], ["--tls-client-ca", "both"]),
        (["--listen", "unix:/x", "--tls-cert", "/c", "--tls-key", "/k"], ["--listen host:port"]),
    ],
)
def test_flags_that_do_not_fit_together(store: Path, given: list[str], words: list[str]) -> None:
    status, message = refused(store, *given)
    assert (status, message.count("\n")) == (2, 1)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"address": "weights.example.org:7411"}, ["another machine", "tls_ca="]),
        ({"address": "dns:///10.1.2.3:7411"}, ["another machine", "tls_ca="]),
        ({"address": "weights.example.org"}, ["weights.example.org", "host:port"]),
        ({"address": "http://localhost:80"}, ["http://localhost:80", "host:port"]),
        ({"address": "localhost:0"}, ["localhost:0"]),
        ({"address": "unix:relative"}, ["absolute"]),
        ({"address": "unix:/x", "tls_ca": "/ca"}, ["tls_ca="]),
        ({"tls_ca": "/ca"}, ["address="]),
        ({"address": "localhost:1", "tls_ca": "/ca", "tls_cert": "/c"}, ["tls_cert=", "tls_key="]),
        ({"address": "localhost:1", "tls_cert": "/c", "tls_key": "/k"}, ["tls_ca="]),
        ({"address": "localhost:1", "tls_ca": "/no/such.pem"}, ["/no/such.pem", "no such file"]),
        ({"address": "localhost:1", "tls_ca": "/dev/null"}, ["/dev/null", "PEM"]),
        ({"timeout_s": 1e12}, ["1e+12", "86400"]),
        ({"timeout_s": float("nan")}, ["nan"]),
        ({"timeout_s": float("inf")}, ["inf"]),
    ],
)
def test_a_clients_options_are_checked_in_one_line(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        FlashClient("m", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_path_alone_is_a_unix_socket(store: Path) -> None:
    with serving(store, "--dram", "64MiB"):
        assert names_at(f"{store}.sock", TlsOptions()) == ["tiny"]


def test_a_message_beyond_the_bound_is_refused(daemon: Daemon) -> None:
    long = pb.DescribeModelRequest(name="x" * (2 << 20))
    with pytest.raises(grpc.RpcError) as caught:
        daemon.stub.DescribeModel(long)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert daemon.stub.ListModels(pb.ListModelsRequest()).names == ["tiny"]
