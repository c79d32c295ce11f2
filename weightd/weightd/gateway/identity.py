"""Who is at the other end of a Unix socket: a signed identity that the client sends with its calls.

gRPC hides the credentials of a Unix socket's peer. So beside each gRPC socket there is a second one, whose name ends in
IDENTITY_SUFFIX. Whoever connects there is sent a signed Identity (proto/weightd.proto) with the user and the groups
that the kernel reports (SO_PEERCRED, SO_PEERGROUPS). The client sends it with its calls. An identity is valid for an
hour, so that leaving a group takes effect. The key is a file of the store, so identities survive a restart of weightd,
but not of the machine. A process that passes its identity on gives away no more than the weights that it can read
anyway.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc.aio
from google.protobuf.message import DecodeError

from weightd.errors import StoreError
from weightd.gateway.access import Caller
from weightd.gateway.front import CallOrigin
from weightd_proto import weightd_pb2
from weightd_proto.addresses import IDENTITY_METADATA_KEY

KEY_FILE = "identity.key"
KEY_BYTES = 32
VALID_S = 3600
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SO_PEERGROUPS = 59  # of Linux 4.13; the socket module does not name it
GROUPS_MAX = 256  # of one user: getsockopt() of Python gives at most 1 KiB

Context = grpc.aio.ServicerContext[Any, Any]


def seconds_since_boot() -> float:
    """Read from a clock that cannot be set and that also runs while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Identities:
    """Signs and checks identities with the key in `folder`, which is made if it is missing. Raises StoreError."""

    def __init__(self, folder: Path) -> None:
        boot_id = BOOT_ID.read_bytes() if BOOT_ID.exists() else b""
        # Valid for this boot only, because the claims hold seconds since boot.
        self._key = hmac.digest(_key(folder / KEY_FILE), boot_id, hashlib.sha256)
        self.origins: Mapping[str, CallOrigin] = {}  # the front's, by the name of a connection to gRPC

    def origin(self, context: Context) -> CallOrigin | None:
        """Where this call comes from. None if its connection has ended."""
        return self.origins.get((context.peer() or "").removeprefix("unix-abstract:"))

    def issue(self, user_id: int, group_ids: list[int], now_s: float | None = None) -> bytes:
        """A serialized Identity, issued at `now_s`: seconds since boot, by default now."""
        claim = weightd_pb2.IdentityClaim(
            user_id=user_id, group_ids=group_ids, issued_boot_s=int(seconds_since_boot() if now_s is None else now_s)
        ).SerializeToString()
        return weightd_pb2.Identity(claim=claim, signature=self._signature(claim)).SerializeToString()

    def check(self, identity: bytes) -> weightd_pb2.IdentityClaim | None:
        """The claim of an identity. None if its signature is wrong, or if it is too old."""
        try:
            parsed = weightd_pb2.Identity.FromString(identity)
        except DecodeError:
            return None
        if not hmac.compare_digest(self._signature(parsed.claim), parsed.signature):
            return None
        claim = weightd_pb2.IdentityClaim.FromString(parsed.claim)
        age_s = seconds_since_boot() - claim.issued_boot_s
        return claim if -1 <= age_s <= VALID_S else None

    def caller(self, context: Context) -> Caller:
        """Who makes this call."""
        origin = self.origin(context)
        if origin is None or not origin.local:
            return Caller(local=False, tls_names=frozenset() if origin is None else origin.tls_names)
        shown = dict(context.invocation_metadata() or ()).get(IDENTITY_METADATA_KEY, b"")
        claim = self.check(shown) if isinstance(shown, bytes) else None
        if claim is None:
            return Caller(local=True)
        return Caller(local=True, user_id=claim.user_id, group_ids=frozenset(claim.group_ids))

    def _signature(self, claim: bytes) -> bytes:
        return hmac.digest(self._key, claim, hashlib.sha256)


class IdentityProtocol(asyncio.Protocol):
    """A connection of the identity socket: it is answered at once, and nothing is read from it."""

    def __init__(self, identities: Identities) -> None:
        self._identities = identities

    def connection_made(self, transport: Any) -> None:  # Any: uvloop's classes do not derive from asyncio's
        connection = transport.get_extra_info("socket")
        _, user_id, group_id = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        groups = {group_id, *_groups(connection)}
        transport.write(self._identities.issue(user_id, sorted(groups)))
        transport.close()


def _groups(connection: Any) -> list[int]:
    """The peer's supplementary groups. Empty if the kernel does not report them, or if there are too many."""
    try:
        packed = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, GROUPS_MAX * 4)
    except OSError:
        return []
    return [group for (group,) in struct.iter_unpack("I", packed)]


def _key(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        key = path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot make {path}: {(error.strerror or '').lower()}; make the store writable") from error
    else:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key := os.urandom(KEY_BYTES))
    if len(key) != KEY_BYTES:
        raise StoreError(f"{path} has {len(key)} bytes instead of {KEY_BYTES}: delete it, a new one is made")
    return key
