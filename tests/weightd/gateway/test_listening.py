"""Files at the path of a socket: stale sockets, live sockets, other files."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from weightd.errors import UsageError
from weightd.gateway.addresses import parse_listen
from weightd.gateway.listening import data_socket, prepare, private_sockets, remove_stale


def test_a_dead_socket_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    prepare(parse_listen(f"unix:{path}"))
    assert not path.exists()


def test_a_live_socket_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen(0)
        for _ in range(3):  # also when its queue is full
            with pytest.raises(UsageError, match="another process listens"):
                prepare(parse_listen(f"unix:{path}"))
    assert path.exists()


def test_a_socket_of_another_kind_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as live:
        live.bind(str(path))
        with pytest.raises(UsageError, match="another --listen"):
            remove_stale(path, socket.SOCK_STREAM)
    assert path.exists()


def test_a_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(UsageError, match="not a socket"):
        prepare(parse_listen(f"unix:{path}"))
    assert path.read_text() == "precious"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        prepare(parse_listen(f"unix:{tmp_path}/none/s"))


def test_a_default_folder_is_made_for_its_owner(tmp_path: Path) -> None:
    prepare(parse_listen(f"unix:{tmp_path}/run/s", default=True))
    assert (tmp_path / "run").stat().st_mode & 0o007 == 0


def test_the_data_socket_is_beside_the_first_unix_socket(tmp_path: Path) -> None:
    addresses = (parse_listen("localhost:1"), parse_listen(f"unix:{tmp_path}/s"))
    with data_socket(addresses) as path:
        assert path == tmp_path / "s.data"


def test_sockets_are_private_from_their_first_moment(tmp_path: Path) -> None:
    with private_sockets(), socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "s"))
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o660
