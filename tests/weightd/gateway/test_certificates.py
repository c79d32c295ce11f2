"""`weightd cert`: what it makes lets a client in over real TLS, keeps others out, and is never overwritten."""

from __future__ import annotations

import stat
from pathlib import Path

import grpc
import pytest
from daemon import free_port, serving
from tiny_store import write_model

from flashclient.daemon.address import TlsOptions
from flashclient.daemon.channel import Connection
from flashclient.errors import NoDaemonError
from weightd.cli import main


def test_a_daemon_and_its_client(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "store")
    out = tmp_path / "tls"
    assert main(["cert", "--out", str(out), "--host", "localhost", "--host", "127.0.0.1"]) == 0
    assert main(["cert", "--out", str(out), "--client", "alice"]) == 0
    assert "alice.crt" in capsys.readouterr().out
    assert {path.name for path in out.glob("*.key") if stat.S_IMODE(path.stat().st_mode) == 0o600} == {
        "ca.key", "localhost.key", "alice.key",
    }  # fmt: skip
    ca, cert, key = out / "ca.crt", out / "localhost.crt", out / "localhost.key"
    alice = TlsOptions(ca, out / "alice.crt", out / "alice.key")
    address = f"127.0.0.1:{free_port()}"
    credentials = grpc.ssl_channel_credentials(
        ca.read_bytes(), (out / "alice.key").read_bytes(), (out / "alice.crt").read_bytes()
    )
    flags = ["--dram", "64MiB", "--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(ca)]
    flags += ["--allow", "*=tls:alice"]
    with serving(tmp_path / "store", *flags, address=address, credentials=credentials):
        for host in ("127.0.0.1", "localhost"):
            connection = Connection(address.replace("127.0.0.1", host), 5.0, alice)
            assert connection.describe("tiny").name == "tiny"
            connection.close()
        for refused in (TlsOptions(ca), TlsOptions(ca, cert, key)):  # a server's certificate is no client's
            with pytest.raises(NoDaemonError):
                Connection(address, 5.0, refused).describe("tiny")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([], 2, "nothing to make"),
        (["--host", "a/b"], 2, "'a/b' cannot be the name of a certificate"),
        (["--host", "../x"], 2, "cannot be the name"),
        (["--client", "ca"], 2, "'ca' cannot be the name"),
        (["--client", "x", "--client", "x"], 2, "a name is given twice"),
        (["--host", "x", "--days", "0"], 2, "--days 0 must be from 1"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str], status: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cert", "--out", str(tmp_path / "tls"), *arguments]) == status
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "tls").exists()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cert", "--out", str(tmp_path), "--host", "a"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["cert", "--out", str(tmp_path), "--client", "b", "--client", "a"]) == 1
    assert "a.crt is there already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "ca.key").write_bytes((tmp_path / "a.key").read_bytes())
    assert main(["cert", "--out", str(tmp_path), "--client", "b"]) == 1
    assert "ca.key is not the key of" in capsys.readouterr().err
    (tmp_path / "ca.crt").write_text("no certificate")
    assert main(["cert", "--out", str(tmp_path), "--client", "b"]) == 1
    assert "are no authority" in capsys.readouterr().err
    assert not (tmp_path / "b.crt").exists()
