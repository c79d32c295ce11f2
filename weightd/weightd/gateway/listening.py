"""Listening sockets: private ones on the file system, whose stale files are replaced, and TCP ports."""

from __future__ import annotations

import errno
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from weightd.errors import DeviceError, UsageError
from weightd.gateway.addresses import ListenAddress
from weightd_proto.addresses import DATA_SUFFIX, IDENTITY_SUFFIX, SOCKET_FILE, unfit_for_a_socket

SOCKET_MODE = 0o660  # who may attach: the daemon's user and group
SYSTEM_FOLDER_MODE = 0o750
USER_FOLDER_MODE = 0o700


def prepare(address: ListenAddress) -> None:
    """Makes room for a Unix socket; UsageError when a live one is there, DeviceError when its folder cannot be used."""
    path = address.socket_path
    if path is None:
        return
    if address.default:
        _make_folder(path.parent)
    if not path.parent.is_dir():
        raise UsageError(f"cannot listen at {path}: there is no folder {path.parent}; make it first")
    for one in (path, identity_socket(address)):
        assert one is not None
        remove_stale(one, socket.SOCK_STREAM)


def identity_socket(address: ListenAddress) -> Path | None:
    """The identity socket that belongs to a gRPC socket (weightd.gateway.identity)."""
    path = address.socket_path
    return None if path is None else path.with_name(path.name + IDENTITY_SUFFIX)


def remove_stale(path: Path, kind: socket.SocketKind) -> None:
    """Deletes the socket file of a dead process. UsageError if a live one answers, or if it is not a socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"cannot listen at {path}: it is a file, not a socket; choose another --listen")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)  # a full queue of a live listener must not block us
        try:
            probe.connect(os.fsencode(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass
        except OSError as error:
            raise UsageError(f"cannot listen at {path}: {error.strerror}; choose another --listen") from error
    raise UsageError(f"cannot listen at {path}: another process listens there; stop it or choose another --listen")


@contextmanager
def data_socket(addresses: tuple[ListenAddress, ...]) -> Iterator[Path]:
    """A path for the data socket: beside the first Unix socket, else in a private folder that is removed at the end."""
    beside = [address.socket_path for address in addresses if address.socket_path is not None]
    if beside:
        path = beside[0].with_name(beside[0].name + DATA_SUFFIX)
        remove_stale(path, socket.SOCK_SEQPACKET)
        yield path
        path.unlink(missing_ok=True)
        return
    name = f"{SOCKET_FILE}{DATA_SUFFIX}"
    short = unfit_for_a_socket(Path(tempfile.gettempdir()) / "weightd-12345678" / name) is None
    with tempfile.TemporaryDirectory(prefix="weightd-", dir=None if short else "/tmp") as folder:
        yield Path(folder) / name


@contextmanager
def private_sockets() -> Iterator[None]:
    """Sockets that are bound inside the `with` statement have SOCKET_MODE from the start.

    Before a chmod another user could connect.
    """
    before = os.umask(0o777 & ~SOCKET_MODE)
    try:
        yield
    finally:
        os.umask(before)


def listen_at_path(path: str) -> socket.socket:
    """A listening Unix socket. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(path)
        listener.listen(socket.SOMAXCONN)
    except OSError:
        listener.close()
        raise
    return listener


def listen_at_port(host: str, port: int) -> list[socket.socket]:
    """Sockets for all addresses of `host` that this machine has. Raises OSError if one is taken or there is none."""
    found: list[socket.socket] = []
    refused: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        listener = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
            listener.bind(address)
            listener.listen(socket.SOMAXCONN)
        except OSError as error:
            listener.close()
            refused = error
            continue
        found.append(listener)
    if refused is not None and (not found or refused.errno == errno.EADDRINUSE):
        for listener in found:
            listener.close()
        raise refused
    return found


class Unnamed:
    """A Unix socket for gRPC, whose name is removed once gRPC listens, so that no other process can connect."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="weightd-"))
        self._folder_fd = os.open(self._folder, os.O_PATH | os.O_CLOEXEC)
        self.target = f"unix:/proc/self/fd/{self._folder_fd}/inner"  # short, however long the folder's path is
        self.fd = -1

    def hide(self) -> None:
        """Call it once gRPC listens: keeps a descriptor of the socket and removes its name."""
        self.fd = os.open("inner", os.O_PATH | os.O_CLOEXEC, dir_fd=self._folder_fd)
        os.unlink("inner", dir_fd=self._folder_fd)
        self._folder.rmdir()

    def close(self) -> None:
        for descriptor in (self.fd, self._folder_fd):
            with suppress(OSError):
                os.close(descriptor)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=SYSTEM_FOLDER_MODE if os.geteuid() == 0 else USER_FOLDER_MODE, parents=True, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        raise DeviceError(f"cannot make {folder}: {error.strerror}; give --listen unix:/path") from error
    # The folder under /tmp has a name that others could have taken first.
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
        raise DeviceError(f"{folder} belongs to another user; give --listen unix:/path")
