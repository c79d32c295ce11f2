"""What users hold of the front: connections, calls, bytes of messages, and how fast they may send what costs us work.

A user is one of this machine over a Unix socket, else the name in a certificate, else an address: what the kernel or
TLS has proven, never what a client says.
"""

from __future__ import annotations

import ipaddress
import time
from dataclasses import dataclass, field

CONNECTIONS_MAX = 1024  # each takes about 30 KiB of us, and three descriptors
CONNECTIONS_OF_USER = 256
STREAMS_OF_USER = 256  # calls that are open for the client; those beyond CALLS_OF_PEER have been refused
STREAMS_MAX = 1024
# Messages above 16 KiB: those of the calls that one user may make at once (call_bounds), and of three such users.
MESSAGE_BYTES_OF_USER = 12 << 20
MESSAGE_BYTES_MAX = 36 << 20
COST_PER_S = 5_000  # in frames; what a user has sent beyond COST_MAX is read when its time has come
COST_MAX = 10_000


@dataclass
class Totals:
    """Of all users."""

    connections: int = 0
    streams: int = 0
    message_bytes: int = 0


@dataclass
class User:
    """One user's account; there is one for each that has a connection."""

    name: str
    totals: Totals
    connections: int = 0
    streams: int = 0
    message_bytes: int = 0
    _cost: float = 0.0
    _counted_s: float = field(default_factory=time.monotonic)

    def open_stream(self) -> None:
        self.streams += 1
        self.totals.streams += 1

    def close_stream(self) -> None:
        self.streams -= 1
        self.totals.streams -= 1

    def reserve(self, size_bytes: int) -> bool:
        """Whether a message of that size may come."""
        of_all, of_user = self.totals.message_bytes + size_bytes, self.message_bytes + size_bytes
        if of_user > MESSAGE_BYTES_OF_USER or of_all > MESSAGE_BYTES_MAX:
            return False
        self.totals.message_bytes, self.message_bytes = of_all, of_user
        return True

    def give_back(self, size_bytes: int) -> None:
        self.totals.message_bytes -= size_bytes
        self.message_bytes -= size_bytes

    def pause_s(self, cost: float) -> float:
        """How long to wait before more is read, after what cost that much. Less than nothing: it has earned that."""
        now_s = time.monotonic()
        self._cost = max(0.0, self._cost + cost - (now_s - self._counted_s) * COST_PER_S)
        self._counted_s = now_s
        return max(0.0, (self._cost - COST_MAX) / COST_PER_S)

    def is_square(self) -> bool:
        return not self.pause_s(0) and not self._cost


def host_name(host: str) -> str:
    """Of the user behind an address: those of one IPv6 network are one."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.version == 6:
        mapped = getattr(address, "ipv4_mapped", None)
        return str(mapped) if mapped else str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
